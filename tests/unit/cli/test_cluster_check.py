"""`simclr-ray cluster check`: exit codes, and what is shown of a file and of the run on it."""

from __future__ import annotations

from pathlib import Path

from tests.unit.cli.test_app import ROOT, errors, run

CLUSTER = ROOT / "cluster"


def test_a_file_that_is_filled_in_passes_and_its_run_is_shown(tmp_path: Path) -> None:
    text = (CLUSTER / "kuberay-rayjob.yaml").read_text("utf-8").replace("REPLACE-ME", "mine")
    (tmp_path / "job.yaml").write_text(text)
    options = ("--images", "50000", "--images-per-second-per-worker", "1000")
    done = run("cluster", "check", "job.yaml", *options, "epochs=1000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert rows["local batch"] == "1024 images"
    assert rows["hours"].strip().startswith("3.5 of training")  # 1000 * 50,000 / 4,000 / 3,600
    assert "FAIL" not in done.stdout


def test_a_file_as_it_comes_is_refused_with_code_2_and_what_to_do(tmp_path: Path) -> None:
    done = run("cluster", "check", str(CLUSTER / "slurm.sh"), cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "still REPLACE-ME" in line
    assert "-> write yours in place of REPLACE-ME" in done.stdout


def test_what_is_no_launch_file_ends_in_2_with_one_line(tmp_path: Path) -> None:
    done = run("cluster", "check", "none.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert errors(done) == ["error: none.yaml: cannot be read: No such file or directory"]
    wrong = run("cluster", "check", str(CLUSTER / "aws.yaml"), "batch_sise=8", cwd=tmp_path)
    assert wrong.returncode == 2
    assert errors(wrong)[0].startswith(
        "error: batch_sise: unknown key (did you mean 'batch_size'?)"
    )
