"""Measurements on one GPU: `python3 benchmarks/gpu --output DIR`, from any folder; minibert need not be installed.

On the day, from the repository's root, in this order (minutes are expected, not measured):

    python3 -m pytest -m gpu -n 0                                                          about 4 minutes
    python3 benchmarks/gpu --output DIR --packed packed --minutes 8.5                      8.5 minutes

The second command starts with the rows that decide most, starts none that would not end in time, and names those that
are left. Repeated with the same DIR it goes on with them; all rows take about 20 minutes, so three calls, of which the
third completes what the first two have decided. A machine that hands back only an output folder, and keeps nothing,
starts a further call from the file of the one before, brought along:

    python3 benchmarks/gpu --merge EARLIER.json --output DIR &&
    python3 benchmarks/gpu --output DIR --packed packed --minutes 8.5                      8.5 minutes

Where there is no git, `--commit` or the variable MINIBERT_COMMIT says what is measured.

Before the day, where the data sets and the demo weights are, `python3 benchmarks/gpu --pack packed` writes what is to
be carried along: 47 MB of real texts, their tokenizer and the weights of MiniLM in half precision. Without it the rows
use the messages bundled with minibert and random weights, and say so. `--list` prints the rows and their expected
seconds. `--smoke` runs them at tiny sizes, also on a CPU.

Every row is a process of its own with a time limit, so a row that is killed or hangs costs only itself. The results
file, DIR/gpu-<device>.json, is written anew after every row.

| file | what |
|---|---|
| `cli.py` | the command |
| `plan.py` | the rows, the most valuable first |
| `supervisor.py` | runs rows in processes until the time is up |
| `results.py` | the results file: header, merging, the table at the end |
| `texts.py`, `workloads.py` | real texts, and the batches made of them; the models' sizes |
| `clock.py` | windows of training steps; times on the device |
| `minibert_steps.py`, `transformers_steps.py` | training, timed in windows |
| `whole_runs.py`, `transformers_run.py` | from files of texts to a model folder |
| `kernels.py`, `ceilings.py`, `profiling.py` | single kernels, the machine's own rates, where a step's time goes |
"""
