"""Names that are imported when they are first used."""

import subprocess
import sys

import pytest

import ggml_cffi
from ggml_cffi import files, models


@pytest.mark.parametrize("package", [ggml_cffi, files, models])
def test_every_public_name_is_there(package):
    assert not [name for name in package.__all__ if not hasattr(package, name)]


@pytest.mark.parametrize("package", [ggml_cffi, files, models])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_the_import_leaves_files_and_training_for_later():
    code = (
        "import sys, ggml_cffi\n"
        "assert 'ggml_cffi.train.gradients' not in sys.modules\n"
        "assert 'ggml_cffi.files.requantize' not in sys.modules\n"
        "assert ggml_cffi.train.gradients is ggml_cffi.gradients\n"
        "assert ggml_cffi.files.quantize_file is ggml_cffi.quantize_file\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_import_of_models_leaves_parsers_and_downloads_for_later():
    code = (
        "import sys, numpy\n"
        "before = set(sys.modules)\n"
        "import ggml_cffi.models\n"
        "later = {'ggml_cffi.models.chat_parser.formats', 'ggml_cffi.models.sentence_encoder',\n"
        "         'ggml_cffi.models.hub', 'subprocess', 'zipfile', 'tempfile', 'shutil', 'hashlib'}\n"
        "assert not later & (sys.modules.keys() - before), later & (sys.modules.keys() - before)\n"
        "from ggml_cffi.models import ChatParser\n"
        "assert ChatParser is ggml_cffi.models.chat_parser.ChatParser\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
