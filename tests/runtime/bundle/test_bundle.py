"""The bundle: its version, its fields, and its files by their hashes."""

import json
import os

import pytest

from smolvla_edge.runtime import Bundle, BundleError, Policy
from smolvla_edge.runtime.bundle import bundle
from smolvla_edge.runtime.bundle import manifest as contract
from smolvla_edge.runtime.bundle.normalization import Normalization


def edit(folder, change):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def refused(folder, message):
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_a_missing_bundle_names_the_command_that_makes_one(tmp_path):
    refused(tmp_path / "none", "does not exist: make one with smolvla-export")
    refused(tmp_path, "has no manifest.json")


def test_a_newer_bundle_asks_for_a_newer_runtime(tiny_bundle):
    edit(
        tiny_bundle,
        lambda m: m.update(version=contract.VERSION + 1, source="elsewhere", future="yes"),
    )
    refused(tiny_bundle, "upgrade the runtime")


def test_an_older_bundle_prints_the_command_that_exports_it_again(tiny_bundle):
    edit(tiny_bundle, lambda m: m.update(version=0))
    refused(
        tiny_bundle,
        r"smolvla-export .*checkpoint --precision fp32 --target portable --output .*bundle --force",
    )
    edit(tiny_bundle, lambda m: (m["source"].update(demo=True), m.update(target="cpu")))
    refused(
        tiny_bundle,
        r"smolvla-export --demo --precision fp32 --target cpu --output .*bundle --force",
    )


def test_unknown_and_missing_fields_are_named_together(tiny_bundle):
    def change(m):
        del m["cameras"], m["sampling"]["num_steps"]
        m["colour"] = "red"

    edit(tiny_bundle, change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(tiny_bundle)
    for part in (
        "unknown field colour",
        "missing field cameras",
        "missing field sampling.num_steps",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["../prefix.onnx", "/etc/passwd", "a/b", ".hidden", ""])
def test_file_names_must_be_plain(tiny_bundle, name):
    def change(m):
        m["files"][name] = m["files"]["tokenizer.json"]

    edit(tiny_bundle, change)
    refused(tiny_bundle, "not a plain name")


def test_a_link_is_no_plain_file(tiny_bundle):
    (tiny_bundle / "tokenizer.json").rename(tiny_bundle.parent / "outside.json")
    (tiny_bundle / "tokenizer.json").symlink_to(tiny_bundle.parent / "outside.json")
    refused(tiny_bundle, "not a plain file")


def test_every_damaged_file_is_named(tiny_bundle):
    (tiny_bundle / "tokenizer.json").unlink()
    with (tiny_bundle / "expert.onnx.data").open("ab") as f:
        f.write(b"x")
    refused(tiny_bundle, r"expert\.onnx\.data has .* bytes.*tokenizer\.json cannot be read")


def test_one_flipped_bit_is_found(tiny_bundle):
    path = tiny_bundle / "prefix.onnx.data"
    Bundle.open(tiny_bundle)
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    refused(tiny_bundle, "prefix.onnx.data has changed since the export")


def test_hashes_are_computed_once_until_a_file_changes(tiny_bundle, monkeypatch):
    hashed = []
    original = bundle.sha256_of
    monkeypatch.setattr(bundle, "sha256_of", lambda p: hashed.append(p.name) or original(p))
    opened = Bundle.open(tiny_bundle)
    assert sorted(hashed) == sorted(opened.manifest.files)
    hashed.clear()
    Bundle.open(tiny_bundle)
    assert hashed == []
    os.utime(tiny_bundle / "tokenizer.json")
    Bundle.open(tiny_bundle)
    assert hashed == ["tokenizer.json"]


def test_what_is_derived_is_kept_private_to_the_user(tiny_bundle):
    opened = Bundle.open(tiny_bundle)
    assert opened.cache_folder.stat().st_mode & 0o777 == 0o700
    assert opened.cache_folder.name == opened.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(precision="int3"), "precision is 'int3', expected one of"),
        (lambda m: m["sampling"].update(chunk_size="50"), "chunk_size is '50', expected int"),
        (lambda m: m["files"].pop("selfcheck.npz"), "'selfcheck.npz' is not listed"),
        (lambda m: m["prefix"].update(file="other.onnx"), "'other.onnx' is not listed"),
    ],
)
def test_an_edited_manifest_is_refused(tiny_bundle, change, message):
    edit(tiny_bundle, change)
    refused(tiny_bundle, message)


@pytest.mark.parametrize(
    ("mode", "statistics", "problem"),
    [
        ("MEAN_STD", {"mean": (0.0,)}, "MEAN_STD needs statistic 'std'"),
        ("MEAN_STD", {"mean": (0.0, 1.0), "std": (1.0,)}, "'mean' has 2 values, expected 1"),
        ("MEAN_STD", {"mean": (0.0,), "std": (-1.0,)}, "'std' is negative"),
        ("MIN_MAX", {"min": (0.0,), "max": (float("nan"),)}, "'max' is not finite"),
        ("QUANTILES", {"q01": (1.0,), "q99": (0.0,)}, "'q01' is above 'q99'"),
    ],
)
def test_statistics_that_cannot_normalise_are_found(mode, statistics, problem):
    (found,) = Normalization(mode, 1e-8, statistics).problems(1)
    assert problem in found


def test_a_graph_that_does_not_match_the_manifest_is_refused(tiny_bundle):
    def swap(m):
        m["prefix"]["file"], m["expert"]["file"] = m["expert"]["file"], m["prefix"]["file"]

    edit(tiny_bundle, swap)
    with pytest.raises(Exception, match="other inputs than the manifest"):
        Policy.load(tiny_bundle, device="cpu")


def test_the_manifest_holds_what_a_reader_needs(export_case):
    m = Bundle.open(export_case("tiny", "fp32")).manifest
    assert [c.name for c in m.cameras] == ["front", "wrist"]
    assert m.cache_bytes == sum(t.bytes for t in m.prefix.outputs[1:])
    assert m.prefix.flops > m.expert.flops > 0
    assert set(m.parity) == {"images", "tokens", "state", "cache", "velocity", "actions", "chunk"}
    assert m.built_with["torch"]
