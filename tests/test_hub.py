"""--push-to-hub: what is uploaded, what stays, and what the card says, with a Hub that only takes notes."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import metadata_load
from huggingface_hub.utils import validate_repo_id

import minibert
from minibert import cli
from minibert.errors import UserError
from minibert.finetune import main
from minibert.inference.hub import KEPT_HOME, PUBLISHED


class FakeApi:
    """The two calls, with the folder as it was then."""

    uploads: list[dict[str, Any]]
    fail = False

    def create_repo(self, name: str, **options: Any) -> huggingface_hub.RepoUrl:
        assert options == {"private": options["private"], "exist_ok": True}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> None:
        if self.fail:
            raise OSError("no connection")
        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        sent = {path for path in paths if any(fnmatch(path, pattern) for pattern in allow_patterns)}
        self.uploads.append({"sent": sent, "kept": set(paths) - sent, **options})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(FakeApi, "uploads", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    return FakeApi


@pytest.fixture
def command(films: Path, film_model: Path, tmp_path: Path) -> list[str]:
    flags = ["--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "run")]
    return ["--train", str(films), "--model", str(film_model), *flags]


def test_a_run_is_published_without_texts(
    api: type[FakeApi], command: list[str], films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--push-to-hub", "me/films"])
    (upload,) = api.uploads
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert upload["sent"] == model | {"README.md", "metrics.json"} and upload["repo_id"] == "me/films"
    texts = [line.rpartition(",")[0] for line in films.read_text().splitlines()[1:]]
    for name in upload["sent"] - {"model.safetensors", "tokenizer.json"}:
        content = (tmp_path / "run" / name).read_text()
        assert not any(text in content for text in texts) and str(tmp_path) not in content, name
    assert "published: https://huggingface.co/me/films" in capsys.readouterr().out
    minibert.load(tmp_path / "run").push_to_hub("me/again", private=True)
    assert api.uploads[1]["sent"] == upload["sent"]


def test_git_leaves_out_the_same(api: type[FakeApi], command: list[str], tmp_path: Path) -> None:
    main([*command, "--quiet", "--push-to-hub", "me/films"])
    (upload,) = api.uploads
    git = ["git", "-C", str(tmp_path / "run")]
    subprocess.run([*git, "init", "--quiet"], check=True)
    listed = subprocess.run([*git, "ls-files", "--others", "--exclude-standard"], check=True, capture_output=True)
    assert set(listed.stdout.decode().split()) == upload["sent"] | {".gitignore"}
    assert not set(PUBLISHED) & set(KEPT_HOME)


def test_seeds_publish_the_best_one_once(api: type[FakeApi], command: list[str]) -> None:
    main([*command, "--quiet", "--seeds", "1,2", "--push-to-hub", "me/films"])
    (upload,) = api.uploads
    assert not [name for name in upload["sent"] if "seed" in name] and "model.safetensors" in upload["sent"]


def test_what_cannot_be_published_is_told_before_training(
    api: type[FakeApi], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--push-to-hub a/b/c: "):
        main([*command, "--push-to-hub", "a/b/c"])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="not logged in"):
        main([*command, "--push-to-hub", "me/films"])
    assert not (tmp_path / "run").exists()


def test_a_failed_upload_leaves_a_finished_run(
    api: type[FakeApi], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "fail", True)
    assert cli.run_command(main, [*command, "--quiet", "--push-to-hub", "me/films"]) == 2
    with pytest.raises(UserError, match="push_to_hub='me/films': no connection; the model is in "):
        minibert.load(tmp_path / "run").push_to_hub("me/films")


def test_the_cards_metadata(minilm: Path, film_model: Path, tmp_path: Path) -> None:
    texts, labels = [f"a {word} film {i}" for i in range(20) for word in ("good", "bad")], [1, 0] * 20
    recipe: dict[str, Any] = {"max_steps": 1, "quiet": True, "device": "cpu", "freeze": "all"}
    minibert.finetune(texts, labels, output=tmp_path / "default", **recipe)
    minibert.finetune(texts, labels, model=tmp_path / "default", output=tmp_path / "further", **recipe)
    minibert.finetune(texts, labels, model=film_model, output=tmp_path / "other", **recipe)
    shutil.copytree(film_model, tmp_path / "odd")
    (tmp_path / "odd" / "README.md").write_text("---\nlicense: [1, 2]\nlanguage: 5\nbase_model: /home/me\n---\n")
    minibert.finetune(texts, labels, model=tmp_path / "odd", output=tmp_path / "from-odd", **recipe)
    for name in ("default", "further"):
        found = metadata_load(tmp_path / name / "README.md")
        known = (found["base_model"], found["license"], found["language"])
        assert known == ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", "en")
        validate_repo_id(found["base_model"])
    for name in ("other", "from-odd"):
        found = metadata_load(tmp_path / name / "README.md")
        assert found["license"] == "unknown" and "base_model" not in found and "language" not in found
    for name in ("default", "other"):
        found = metadata_load(tmp_path / name / "README.md")
        assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-classification"
        assert re.fullmatch(r"[a-z0-9.-]+", found["license"]) and all(isinstance(tag, str) for tag in found["tags"])
