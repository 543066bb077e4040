#!/usr/bin/env python3
"""Takes single files out of a wheel on the package index without fetching the whole, which can be gigabytes.

    wheel_members.py REQUIREMENT FOLDER PATTERN...

REQUIREMENT is a name with a version (vllm==0.10.2); each PATTERN (as of fnmatch, over the path in the wheel) must match.
pip says where the wheel is, so that its settings hold; the files come by range requests, or from a file if the index is on
this machine, and are compared with the wheel's own RECORD. FOLDER has the files under their paths in the wheel when all of
them are there, and does not exist before.
"""
import argparse
import base64
import csv
import fnmatch
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile

BLOCK = 1 << 20  # a request costs more than a few bytes too many


class RangeFile(io.RawIOBase):
    """A file behind an address, read by range requests in whole blocks."""

    def __init__(self, url):
        super().__init__()
        self._url, self._position, self._blocks = url, 0, {}
        with self._request(method="HEAD") as reply:
            self._size = int(reply.headers["Content-Length"])
            self._url = reply.url

    def _request(self, **options):
        return urllib.request.urlopen(urllib.request.Request(self._url, **options), timeout=180)

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self._position

    def seek(self, offset, whence=os.SEEK_SET):
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer):
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        index, start = divmod(self._position, BLOCK)
        part = self._block(index)[start : start + length]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _block(self, index):
        if index not in self._blocks:
            self._blocks = {index: self._fetch(index * BLOCK)}  # reading goes forwards: one is enough
        return self._blocks[index]

    def _fetch(self, start):
        end = min(start + BLOCK, self._size)
        with self._request(headers={"Range": f"bytes={start}-{end - 1}"}) as reply:
            if reply.status != 206:
                raise OSError(f"the index answers a request for a part with {reply.status}")
            data = reply.read()
        if len(data) != end - start:
            raise OSError(f"{len(data)} of {end - start} bytes came")
        return data


def open_wheel(address):
    if address.startswith("file:"):
        return open(urllib.request.url2pathname(urllib.parse.urlsplit(address).path), "rb")
    return io.BufferedReader(RangeFile(address))


def wheel_address(requirement):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "--report", report, requirement], check=True)
        return json.loads(report.read_text())["install"][0]["download_info"]["url"]


def recorded_hashes(wheel):
    (record,) = (name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
    rows = csv.reader(io.StringIO(wheel.read(record).decode()))
    return {row[0]: row[1] for row in rows if len(row) > 1 and row[1].startswith("sha256=")}


def check(name, path, recorded):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(BLOCK), b""):
            digest.update(part)
    found = "sha256=" + base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
    if recorded.get(name) != found:
        raise OSError(f"{name} is not what the wheel's RECORD says")


def extract(requirement, target, patterns):
    with open_wheel(wheel_address(requirement)) as file, zipfile.ZipFile(file) as wheel:
        recorded = recorded_hashes(wheel)
        files = [name for name in wheel.namelist() if not name.endswith("/")]
        for pattern in patterns:
            names = fnmatch.filter(files, pattern)
            if not names:
                raise OSError(f"{requirement} has no file {pattern}")
            for name in names:
                check(name, wheel.extract(name, target), recorded)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirement")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN")
    arguments = parser.parse_args()
    new = arguments.folder.with_name(arguments.folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        extract(arguments.requirement, new, arguments.patterns)
        new.rename(arguments.folder)
    except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
        shutil.rmtree(new, ignore_errors=True)
        sys.exit(f"wheel_members.py: {arguments.requirement}: {error}")


if __name__ == "__main__":
    main()
