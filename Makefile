setup: ; pip install -e '.[demo,test]'
check: ; ruff check . && ruff format --check . && mypy
test: ; pytest -m "not slow"
bench: ; cd benchmarks && python steps.py
docs: ; python docs/generate.py && python benchmarks/readme.py
