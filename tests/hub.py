"""A loopback stand-in for the Hugging Face hub, so that tests of download code run offline.

It speaks the part of the hub's protocol by which huggingface_hub, datasets and open_clip list and read repositories:
repository information, tree, paths-info and resolve, with byte ranges. Each repository is a local folder with one
branch, main, whose commit changes with its files. The libraries read HF_ENDPOINT when first imported: Hub.url goes into
the environment of a subprocess, or connect() changes what this process has read.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pytest

import common

API = re.compile(r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?")
RESOLVE = re.compile(r"(?:/(datasets))?/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class NotFound(Exception):
    """A 404 answer, with the error code by which the hub's clients tell what is missing."""


def git_id(*parts):
    return hashlib.sha1(repr(parts).encode()).hexdigest()


class Repo:
    """One local folder as it stands now: its files, the folders over them, and its commit."""

    def __init__(self, folder):
        self.paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        self.sizes = {name: path.stat().st_size for name, path in self.paths.items()}
        self.folders = {str(parent) for name in self.paths for parent in PurePosixPath(name).parents} - {"."}
        self.commit = git_id(*((name, path.stat().st_mtime_ns) for name, path in self.paths.items()), self.sizes)

    def info(self, repo_id):
        files = [{"rfilename": name, "size": size} for name, size in self.sizes.items()]
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {"id": repo_id, "sha": self.commit, "siblings": files} | flags

    def entry(self, name):
        kind = "file" if name in self.paths else "directory"
        return {"type": kind, "path": name, "oid": git_id(self.commit, name), "size": self.sizes.get(name, 0)}

    def tree(self, folder, recursive):
        if folder and folder not in self.folders:
            raise NotFound("EntryNotFound")
        prefix = folder + "/" if folder else ""
        below = sorted(name for name in (*self.paths, *self.folders) if name.startswith(prefix))
        return [name for name in below if recursive or "/" not in name[len(prefix) :]]


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection from the folders of the hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        url = urlsplit(self.path)
        self.record = [self.command, unquote(self.path), self.headers.get("Range"), 0]
        self.server.requests.append(self.record)
        try:
            if match := API.fullmatch(url.path):
                self.send(200, json.dumps(self.api(*match.groups(), parse_qs(form or url.query))).encode())
            elif (match := RESOLVE.fullmatch(url.path)) and self.command != "POST":
                self.resolve(*match.groups())
            else:
                raise NotFound("EntryNotFound")
        except NotFound as error:
            self.send(404, b"{}", {"X-Error-Code": str(error)})

    do_GET = do_HEAD = do_POST = answer

    def repo(self, kind, repo_id, revision):
        if f"{kind}/{repo_id}" not in self.server.repos:
            raise NotFound("RepoNotFound")
        repo = Repo(Path(self.server.repos[f"{kind}/{repo_id}"]))
        if unquote(revision) not in ("main", repo.commit):
            raise NotFound("RevisionNotFound")
        return repo

    def api(self, kind, repo_id, what, revision, path, asked):
        repo = self.repo(kind, repo_id, revision or "main")
        if what == "tree":
            recursive = asked.get("recursive", [""])[0].lower() == "true"
            return [repo.entry(name) for name in repo.tree(unquote(path or ""), recursive)]
        if what == "paths-info":
            return [repo.entry(name) for name in asked["paths"] if name in repo.paths or name in repo.folders]
        return repo.info(repo_id)

    def resolve(self, kind, repo_id, revision, path):
        repo, name = self.repo(kind or "models", repo_id, revision), unquote(path)
        if name not in repo.paths:
            raise NotFound("EntryNotFound")
        content = repo.paths[name].read_bytes()
        headers = {"ETag": f'"{git_id(repo.commit, name)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        span = RANGE.fullmatch(self.headers.get("Range", "")) if self.command == "GET" else None
        if span is None:
            return self.send(200, content, headers)
        first, last = map(int, span.groups())
        content, whole = content[first : last + 1], len(content)
        headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{whole}"
        return self.send(206, content, headers)

    def send(self, status, content, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.record[3] = len(content)  # counted before they go, as the client may look as soon as it has them
            self.wfile.write(content)

    def log_message(self, format, *args):
        """Print nothing: Hub.requests is the log."""


class Hub(ThreadingHTTPServer):
    """The server: its address url, the folders repos, and what was asked of it: [method, path, range, bytes sent]."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.requests = repos, []


@contextlib.contextmanager
def serve_hub(repos):
    """Serve folders, {"datasets/ORG/NAME" or "models/ORG/NAME": folder}, from a free loopback port."""
    hub = Hub(repos)
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def connect(monkeypatch, url, home, offline=False):
    """Let this process ask the hub at url, and keep under home what it gives; offline, have that alone."""
    ours = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in (ours | {"HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": str(home / "hub")}).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name, value in {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": offline, "HF_DATASETS_CACHE": home / "datasets"}.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)  # of huggingface_hub.list_repo_files()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    common.model_folder.cache_clear()


@contextlib.contextmanager
def connected(repos, home):
    """Serve folders as serve_hub() does, and let this process ask for them inside of the context: the hub."""
    with serve_hub(repos) as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub.url, home)
        yield hub
    common.model_folder.cache_clear()
