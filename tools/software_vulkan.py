"""Make Debian 13's software Vulkan driver loadable on Debian 12.

    python3 tools/software_vulkan.py libvulkan_lvp.so FOLDER

Mesa compiles shaders with LLVM. The driver of Debian 12's backports uses LLVM 15, which takes five times as long for
shaders with barriers as LLVM 19. Debian 12 has LLVM 19, and Debian 13 has the same version of Mesa for it. That
driver asks for two things that Debian 12 lacks and that it can do without: five names of glibc 2.38 for ``strtol``
and its kin, and newer functions of window systems. This program writes a copy of the driver to FOLDER that asks for
the old names and tolerates missing window functions, with a manifest for the Vulkan loader beside it. It was run on
x86-64 only.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

DYNSYM, VERNEED, VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF  # types of ELF sections
WEAK_VERSION, WEAK_SYMBOL, UNVERSIONED = 2, 2, 1
NEW_PREFIX = "__isoc23_"  # glibc 2.38 calls strtol of C23 so; the plain name follows
NOT_NEEDED = ("wl_", "xcb_", "drm")  # window systems: ggml opens no window
API_VERSION = "1.4.305"


class Library:
    """A shared library (64 bits, little endian) that is edited in place."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        if data[:6] != b"\x7fELF\x02\x01":
            raise SystemExit("not a little-endian 64-bit ELF library")
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
        by_type = {section[1]: section for section in sections}
        self.symbols, self.versions, self.needed = by_type[DYNSYM], by_type[VERSYM], by_type[VERNEED]
        self.strings = sections[self.symbols[6]][4]

    def name(self, offset: int) -> str:
        """Return the string at ``offset`` of the table of dynamic strings."""
        start = self.strings + offset
        return self.data[start : self.data.index(0, start)].decode()

    def needed_versions(self) -> Iterator[tuple[str, int, int]]:
        """Yield each version that is needed: its name, its number, and the offset of its entry."""
        at = self.needed[4]
        while True:
            _, count, _, first, step = struct.unpack_from("<HHIII", self.data, at)
            entry = at + first
            for _ in range(count):
                _, _, number, name, following = struct.unpack_from("<IHHII", self.data, entry)
                yield self.name(name), number, entry
                entry += following
            if not step:
                return
            at += step

    def relax(self) -> None:
        """Ask for old names where new ones stand for the same functions, and tolerate missing window functions."""
        new = set()
        for name, number, entry in self.needed_versions():
            if name == "GLIBC_2.38":
                new.add(number)
                flags = struct.unpack_from("<H", self.data, entry + 4)[0]
                struct.pack_into("<H", self.data, entry + 4, flags | WEAK_VERSION)
        for i in range(self.symbols[5] // 24):
            symbol, version = self.symbols[4] + 24 * i, self.versions[4] + 2 * i
            offset, info, _, section = struct.unpack_from("<IBBH", self.data, symbol)
            name = self.name(offset)
            if section == 0 and name.startswith(NOT_NEEDED):
                self.data[symbol + 4] = WEAK_SYMBOL << 4 | info & 15
            elif struct.unpack_from("<H", self.data, version)[0] & 0x7FFF in new:
                if not name.startswith(NEW_PREFIX):
                    raise SystemExit(f"the driver needs {name} of glibc 2.38, which has no older name")
                struct.pack_into("<I", self.data, symbol, offset + len(NEW_PREFIX))
                struct.pack_into("<H", self.data, version, UNVERSIONED)


def main() -> None:
    """Write the driver and its manifest."""
    source, folder = map(Path, sys.argv[1:])
    library = Library(source.read_bytes())
    library.relax()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libvulkan_lvp.so").write_bytes(library.data)
    driver = {"api_version": API_VERSION, "library_path": "./libvulkan_lvp.so"}
    (folder / "lvp_icd.json").write_text(json.dumps({"file_format_version": "1.0.0", "ICD": driver}) + "\n")


if __name__ == "__main__":
    main()
