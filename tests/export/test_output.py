"""The folder of a new bundle: nothing of somebody else is replaced, nothing half-written stays."""

import json

import pytest

from smolvla_edge.core.errors import ExportError
from smolvla_edge.export.output import require_output, staging
from smolvla_edge.runtime import Bundle


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    (output / "manifest.json").write_text('{"name": "my web app"}')
    for force, message in (
        (False, "exists"),
        (True, "holds files that are not of a bundle .*thesis.tex"),
    ):
        with pytest.raises(ExportError, match=message), staging(output, force):
            pytest.fail("the export has begun")
    assert sorted(p.name for p in output.iterdir()) == ["manifest.json", "thesis.tex"]


def test_force_replaces_a_bundle_but_not_what_somebody_put_into_it(tiny_bundle):
    (tiny_bundle / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"), staging(tiny_bundle, force=True):
        pytest.fail("the export has begun")
    (tiny_bundle / "notes.txt").unlink()
    with staging(tiny_bundle, force=True) as folder:
        (folder / "manifest.json").write_text("new")
        Bundle.open(tiny_bundle)  # still the old one
    assert [p.name for p in tiny_bundle.iterdir()] == ["manifest.json"]
    assert (tiny_bundle / "manifest.json").stat().st_mode & 0o777 == 0o444
    assert [p.name for p in tiny_bundle.parent.iterdir()] == ["bundle"]


def test_what_appears_at_the_output_during_an_export_is_not_replaced(tmp_path):
    output = tmp_path / "bundle"
    with pytest.raises(ExportError, match="exists"), staging(output, force=False) as folder:
        (folder / "manifest.json").write_text(json.dumps({}))
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("output", [".", "", "/proc/x/y", "file/x"])
def test_an_output_that_cannot_be_is_refused_at_once(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"expected the name of a new folder|cannot be made"):
        require_output(type(tmp_path)(output), force=False)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    output = tmp_path / "deep" / "bundle"
    with pytest.raises(OSError, match="No space"), staging(output, force=False) as folder:
        (folder / "prefix.onnx").write_text("half of it")
        raise OSError(28, "No space left on device")
    assert list(output.parent.iterdir()) == []
