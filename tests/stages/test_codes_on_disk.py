"""train_transformer on codes that were made before."""

from pathlib import Path

import pytest
from small_runs import log, stage_2

from training import tokenize, train_transformer


def test_codes_made_before(
    data: Path, configs: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses are those of a run that makes its codes itself, which the run with ``--codes`` does not; codes of
    another number of copies are refused."""
    short = ["--set", "training.steps=10", "--set", "stage.min_psnr=0"]
    codes = ["--codes", str(tmp_path / "codes")]
    given = stage_2(data, configs, first, tmp_path / "codes")
    tokenize.main([*given, *short, "--shard-size", "32"])
    train_transformer.main([*stage_2(data, configs, first, tmp_path / "own"), *short])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    train_transformer.main([*stage_2(data, configs, first, tmp_path / "given"), *short, *codes])
    assert log(tmp_path / "own") == log(tmp_path / "given")
    assert (tmp_path / "own" / "codes").exists() and not (tmp_path / "given" / "codes").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    with pytest.raises(SystemExit):
        other = [*short, *codes, "--set", "stage.copies=1"]
        train_transformer.main([*stage_2(data, configs, first, tmp_path / "other"), *other])
    assert "codes holds the codes of something else (copies 2 there and 1 now)" in capsys.readouterr().err
