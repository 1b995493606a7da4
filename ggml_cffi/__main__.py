"""``python -m ggml_cffi``: the same as ``ggml-cffi``."""

from ggml_cffi.cli.main import main

raise SystemExit(main())
