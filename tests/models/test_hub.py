"""Models of the Hugging Face hub, from a local server that speaks its API."""

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import ggml_cffi as ggml
from ggml_cffi import cli, models
from ggml_cffi.models.hub import HubAddress, choose_files
from tests.support import PATIENCE, ROOT
from tests.support.byte_level_model import byte_level_model
from tests.support.hub_server import Repo, serve_hub


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the bytes of a small model by name: as one file, and as two parts."""
    folder = tmp_path_factory.mktemp("hub_files")
    whole = byte_level_model(folder / "m.gguf")
    with ggml.GGUFFile(whole) as file:
        tensors = {name: file.array(name).copy() for name in file.tensors}
        parts = ggml.write_gguf(folder / "parts.gguf", file.fields, tensors, max_bytes=200_000)
    assert len(parts) == 2
    return {
        "tiny-Q8_0.gguf": whole.read_bytes(),
        "tiny-Q4_K_M.gguf": whole.read_bytes() + b"\0",
        "README.md": b"A tiny model.",
        "mmproj-tiny-F16.gguf": b"no language model",
    } | {f"tiny-F16-0000{i + 1}-of-00002.gguf": Path(part).read_bytes() for i, part in enumerate(parts)}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """Serve the model, with the cache and the server's address of ``huggingface_hub`` set to it."""
    new = {"new-Q8_0.gguf": files["tiny-Q8_0.gguf"] + 2 * b"\0"}
    repos = {
        "org/tiny": Repo({"main": files, "v1": {"old-Q8_0.gguf": files["tiny-Q8_0.gguf"]}, "refs/pr/1": new}),
        "org/private": Repo({"main": files}, private=True),
        "org/gated": Repo({"main": files}, gated=True),
        "org/one": Repo({"main": {"one.gguf": files["tiny-Q8_0.gguf"]}}),
        "org/empty": Repo({"main": {"README.md": b"no model"}}),
    }
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub(repos) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield found
        huggingface_hub.close_session()
    assert not found.leaked


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://org/repo/a.gguf", ("org/repo", None, "a.gguf", None)),
        ("hf://org/repo/folder/a.gguf", ("org/repo", None, "folder/a.gguf", None)),
        ("hf://org/repo:Q4_K_M", ("org/repo", None, None, "Q4_K_M")),
        ("hf://org/repo.x@v1.0:q8_0", ("org/repo.x", "v1.0", None, "q8_0")),
        ("hf://org/repo@refs%2Fpr%2F1/a.gguf", ("org/repo", "refs/pr/1", "a.gguf", None)),
        ("hf://org/repo", ("org/repo", None, None, None)),
    ],
)
def test_an_address_has_these_parts(address, parts):
    assert HubAddress.parse(address) == HubAddress(*parts)


@pytest.mark.parametrize("address", ["hf://repo", "hf://org/repo/a.bin", "hf://org/repo:", "hf://org/repo/a.gguf:Q8_0"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(ValueError, match=f"{re.escape(address)}.* is no address.*hf://ORG/REPO/FILE.gguf"):
        models.fetch(address)


def test_an_address_that_no_repository_can_have_is_refused():
    with pytest.raises(ValueError, match=r"^hf://a--b/c:Q8_0 is no address of a model on the hub: .*'a--b/c'"):
        models.fetch("hf://a--b/c:Q8_0")


NAMES = [
    "m-Q4_K_M.gguf", "m-Q4_K.gguf", "m.q8_0.gguf", "m-IQ4_XS.gguf", "BF16/m-00001-of-00002.gguf",
    "BF16/m-00002-of-00002.gguf", "m-Q5_0-00001-of-00002.gguf", "a-Q6_K.gguf", "b-Q6_K.gguf", "m-F16.gguf",
    "mmproj-m-F16.gguf", "m.Q8_0.safetensors",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "found"),
    [
        (":Q4_K_M", ["m-Q4_K_M.gguf"]),
        (":Q4_K", ["m-Q4_K.gguf"]),
        (":Q8_0", ["m.q8_0.gguf"]),
        (":bf16", ["BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf"]),
        ("/BF16/m-00002-of-00002.gguf", ["BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf"]),
        (":F16", ["m-F16.gguf"]),
        ("/mmproj-m-F16.gguf", ["mmproj-m-F16.gguf"]),
    ],
)
def test_a_wish_chooses_these_files(wish, found):
    assert choose_files(NAMES, HubAddress.parse(f"hf://o/r{wish}")) == found


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        (":Q4", FileNotFoundError, "no model of the type Q4: it has .*m-Q4_K.gguf"),
        ("/other.gguf", FileNotFoundError, "no other.gguf: it has BF16/m-00001-of-00002.gguf, a-Q6_K.gguf"),
        (":Q6_K", ValueError, "several models of the type Q6_K: a-Q6_K.gguf, b-Q6_K.gguf$"),
        ("", ValueError, "several models: "),
        (":Q5_0", FileNotFoundError, "has 1 of 2 parts"),
    ],
)
def test_a_wish_without_one_answer_names_the_candidates(wish, error, message):
    with pytest.raises(error, match=message):
        choose_files(NAMES, HubAddress.parse(f"hf://o/r{wish}"))


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("hf://org/tiny/tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
        ("hf://org/tiny:q4_k_m", "tiny-Q4_K_M.gguf"),
        ("hf://org/one", "one.gguf"),
    ],
)
def test_a_file_is_downloaded_once(hub, files, address, name):
    path = models.fetch(address)
    assert path.name == name
    assert path.read_bytes() == files.get(name, files["tiny-Q8_0.gguf"])
    sent = hub.sent
    assert models.fetch(address) == path
    assert hub.sent == sent
    # It is where other programs look for it.
    repo = address.removeprefix("hf://").partition(":")[0].removesuffix("/" + name)
    assert huggingface_hub.try_to_load_from_cache(repo, name) == str(path)


def test_revisions_are_told_apart(hub, files):
    assert models.fetch("hf://org/tiny@v1:Q8_0").name == "old-Q8_0.gguf"
    assert models.fetch("hf://org/tiny@refs%2Fpr%2F1:Q8_0").name == "new-Q8_0.gguf"
    commit = hub.commit("org/tiny", "v1")
    assert commit in str(models.fetch(f"hf://org/tiny@{commit}/old-Q8_0.gguf"))
    with pytest.raises(FileNotFoundError, match="org/tiny has no revision 'v9'"):
        models.fetch("hf://org/tiny@v9:Q8_0")


def test_a_split_model_is_loaded_from_all_parts(hub, files):
    reports = []
    path = models.fetch("hf://org/tiny:F16", progress=lambda done, total: reports.append((done, total)))
    assert path.name == "tiny-F16-00001-of-00002.gguf"
    assert path.with_name("tiny-F16-00002-of-00002.gguf").exists()
    total = sum(len(data) for name, data in files.items() if "-of-" in name)
    assert reports == sorted(reports)
    assert reports[-1] == (total, total)
    with models.load("hf://org/tiny/tiny-F16-00002-of-00002.gguf", ["CPU"], n_ctx=64) as model:
        split = model.forward([1, 2])
    with models.load("hf://org/tiny:Q8_0", ["CPU"], n_ctx=64) as model:
        np.testing.assert_array_equal(model.forward([1, 2]), split)


def test_a_private_model_needs_a_token(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no repository org/private, or it is private: set HF_TOKEN"):
        models.fetch("hf://org/private:Q8_0")
    with pytest.raises(PermissionError, match="org/gated asks for your consent on its page"):
        models.fetch("hf://org/gated:Q8_0")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert models.plan("hf://org/private:Q8_0", ["CPU"]).fits
    assert models.fetch("hf://org/private:Q8_0").name == "tiny-Q8_0.gguf"
    assert models.fetch("hf://org/gated:Q8_0").name == "tiny-Q8_0.gguf"
    with pytest.raises(FileNotFoundError, match="there is no repository org/none"):
        models.fetch("hf://org/none:Q8_0")


def test_a_missing_model_names_those_that_are_there(hub):
    with pytest.raises(FileNotFoundError, match=r"no model of the type Q2_K: it has .*, tiny-Q4_K_M.gguf, tiny-Q8"):
        models.fetch("hf://org/tiny:Q2_K")
    with pytest.raises(FileNotFoundError, match=r"no tiny.gguf: it has .*tiny-Q8_0.gguf"):
        models.load("hf://org/tiny/tiny.gguf")
    with pytest.raises(FileNotFoundError, match="no model, and no other GGUF file"):
        models.fetch("hf://org/empty")


def test_the_cache_is_enough_offline(hub, monkeypatch):
    paths = {name: models.fetch(name) for name in ("hf://org/tiny:Q8_0", "hf://org/tiny:F16", "hf://org/tiny@v1:Q8_0")}
    n = len(hub.requests)
    go_offline(monkeypatch)
    assert {name: models.fetch(name) for name in paths} == paths
    assert models.plan("hf://org/tiny:Q8_0", ["CPU"]).fits
    for address in ("hf://org/tiny:Q4_K_M", "hf://org/tiny@v9:Q8_0", "hf://org/one"):
        with pytest.raises(FileNotFoundError, match=f"{address} is not in the cache.*HF_HUB_OFFLINE is set"):
            models.fetch(address)
    assert len(hub.requests) == n


def test_the_cache_is_enough_without_a_connection(hub, monkeypatch):
    path = models.fetch("hf://org/tiny:Q8_0")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert models.fetch("hf://org/tiny:Q8_0") == path
    with pytest.raises(FileNotFoundError, match=r"it has tiny-Q8_0.gguf \(the hub: not reached: "):
        models.fetch("hf://org/tiny:Q4_K_M")


def test_a_plan_reads_the_header_only(hub, capsys):
    plan = models.plan("hf://org/tiny:F16", ["CPU"])
    assert plan.fits
    assert cli.main(["gguf", "show", "--tensors", "hf://org/tiny/tiny-Q8_0.gguf"]) == 0
    assert "blk.0.ffn_down.weight" in capsys.readouterr().out
    assert not os.path.exists(constants.HF_HUB_CACHE)
    models.fetch("hf://org/tiny:F16")
    sent = hub.sent
    assert models.plan("hf://org/tiny:F16", ["CPU"]).devices == plan.devices
    assert hub.sent == sent


def test_the_commands_take_addresses(hub, capsys):
    assert cli.main(["fetch", "hf://org/tiny:Q8_0"]) == 0
    assert capsys.readouterr().out.strip().endswith("tiny-Q8_0.gguf")
    run = ["run", "hf://org/tiny:Q8_0", "--raw", "-p", "a", "-n", "1", "--devices", "CPU"]
    assert cli.main(run) == 0
    assert cli.main(["plan", "hf://org/tiny:Q8_0", "--devices", "CPU"]) == 0
    assert cli.main(["embed", "hf://org/tiny:Q8_0", "-t", "a", "--devices", "CPU"]) == 0
    capsys.readouterr()
    assert cli.main(["run", "hf://org/tiny:Q2_K", "-p", "a"]) == 2
    assert "it has " in capsys.readouterr().err


def test_the_environment_of_huggingface_hub_holds(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    command = [sys.executable, "-m", "ggml_cffi", "fetch", "hf://org/private:Q8_0"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=PATIENCE, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "home" / "hub" / "models--org--private"))


def test_a_missing_package_has_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf://.* needs huggingface_hub, of the extra hub: pip install '.\[hub\]'"):
        models.load("hf://org/tiny:Q8_0")
