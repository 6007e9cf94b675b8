"""
Downloads over `requests` that go on where they broke off.

    path = get(Path("data/downloads/owt_valid.txt.gz"))

The bytes go to NAME.part. After a break we ask for the missing ones only. The file gets its name
when it is complete and its checksum is right. HF_ENDPOINT (a mirror), HF_TOKEN, the proxy variables
and REQUESTS_CA_BUNDLE are honoured.
"""
import os
import time
from pathlib import Path

import requests
import urllib3

from support.files import first_line, locked, sha256, size_of
from support.terminal import progress

# Attempts in a row without progress before we give up.
TRIES = 6
# The longest wait in seconds that a server may ask for.
LONGEST_WAIT = 60
# HTTP statuses that may be gone at the next try: timeout, too many requests, and every error of
# the server. (Mirrors behind a content delivery network have 5xx numbers of their own.)
RETRY_STATUSES = [408, 429, *range(500, 600)]

TINY = "datasets/roneneldan/TinyStories/resolve/main/"
OWT = "datasets/stanford-cs336/owt-sample/resolve/main/"
# File name: (folder on the hub, bytes, sha256). Several public repositories list these numbers.
HUB = {
    "TinyStoriesV2-GPT4-train.txt": (
        TINY, 2227753162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "TinyStoriesV2-GPT4-valid.txt": (
        TINY, 22502601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    "owt_train.txt.gz": (
        OWT, 4591240837, "b19ae88cfbc4016b304c348522455fe38ebac48fffed955adcc7191a89e38ccf"),
    "owt_valid.txt.gz": (
        OWT, 111785382, "bc73db5da2f19c360836b9c8a88094e13346ec83798c2f40060be39135768c80"),
}
# What each source is made of: the training file, then the validation file.
SOURCES = {
    "tinystories": ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"],
    "openwebtext": ["owt_train.txt.gz", "owt_valid.txt.gz"],
}


def get(target, no_verify=False):
    """Make sure that the file `target` is there, and return it. target: a Path, named as in HUB.

    Raises ValueError if it cannot be downloaded, or if it is not what was published and not
    no_verify. A file that is there under a name that HUB lacks is taken as it is.
    """
    folder, size, published = HUB.get(target.name, ("", None, None))
    if target.exists():  # perhaps on a disk that can only be read
        if published and not no_verify:
            check_sha256(target, size, published)
        return target
    if not published:
        raise ValueError(f"{target} does not exist, and the hub has no file of this name")
    part = Path(f"{target}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(f"{target}.lock", message=f"another process is downloading {target}"):
        if target.exists():  # from the process that we have waited for
            return get(target, no_verify)
        if size_of(part) != size:
            download(folder + target.name, part, None if no_verify else size)
        if not no_verify:
            check_sha256(part, size, published)
        part.rename(target)
    return target


def check_sha256(path, size, published):
    """Raise ValueError if a file is not what was published."""
    found = sha256(path)
    if found != published:
        raise ValueError(
            f"{path} ({size_of(path)} bytes) has sha256 {found}, {published} ({size} bytes) was "
            f"expected: --no-verify takes it as it is, else delete it and get it again")


def download(name, part, size):
    """Download a file of the hub to `part`, or raise ValueError with the ways out.

    name: folder and name on the hub. size: its bytes, None to take what comes.
    """
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if "://" not in hub:
        hub = f"https://{hub}"
    url = f"{hub.rstrip('/')}/{name}"
    print(f"downloading {url}", flush=True)
    try:
        with HubSession() as session:
            return fetch(session, url, part, size)
    except requests.RequestException as error:
        # After all retries this holds urllib3's MaxRetryError, whose reason is what went wrong.
        reason = getattr((*error.args, error)[0], "reason", error)
        problem = first_line(reason) + certificate_hint(error)
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"{url}: {problem}: run the same command again, or get the file by other means and place "
        f"it at {part.with_suffix('')} (or give it with --from-file)")


def certificate_hint(error):
    """What to do if an exception says that a server's certificate is not trusted, else ""."""
    if "CERTIFICATE_VERIFY_FAILED" not in str(error):
        return ""
    return ("; the certificate is not trusted: behind a proxy that has its own, set "
            "REQUESTS_CA_BUNDLE to the file of its certificate; else set this machine's clock")


class Retry(urllib3.util.Retry):
    """urllib3's Retry, which waits at most LONGEST_WAIT, whatever a server asks for."""

    def get_retry_after(self, response):
        seconds = super().get_retry_after(response)
        return seconds and min(seconds, LONGEST_WAIT)


class HubSession(requests.Session):
    """A requests.Session that asks again after an error, and has HF_TOKEN for the hub alone."""

    def __init__(self):
        super().__init__()
        # other=0: a certificate that is not trusted is not better at the next try.
        retry = Retry(total=TRIES - 1, other=0, status_forcelist=RETRY_STATUSES, backoff_factor=1)
        for scheme in ("http://", "https://"):
            self.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        # Sizes and ranges are those of the file itself, not of a compressed transfer.
        self.headers["Accept-Encoding"] = "identity"
        # Without an auth of ours, requests would look for passwords in ~/.netrc.
        self.auth = add_token

    def rebuild_auth(self, prepared_request, response):
        """requests calls this to follow a redirect. Its own method adds passwords of ~/.netrc."""
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("Authorization", None)


def add_token(request):
    """Put HF_TOKEN, if there is one, into a request to the hub."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError("HF_TOKEN has characters that no token has (set it anew, or unset it)")
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def fetch(session, url, part, size):
    """Ask for the rest of a file until it is complete, or TRIES times in a row got nothing.

    Two things can go wrong. When no good answer comes, the session asks again. When a good answer
    breaks off in the middle of the file, this loop asks for the rest.
    """
    failures = 0
    while failures < TRIES:
        time.sleep(2 ** failures - 1)
        before = size_of(part)
        headers = {"Range": f"bytes={before}-"} if before else {}
        with session.get(url, headers=headers, stream=True, timeout=60) as reply:
            problem = save(reply, part, before, size)
        if not problem:
            return
        failures = 1 if size_of(part) > before else failures + 1
        print(f"{url}: {problem}", flush=True)
    raise ValueError(f"{problem}, given up after {TRIES} tries")


def save(reply, part, have, size):
    """Append the body of a reply to the first `have` bytes of `part`.

    Returns "" if the file is complete, else why not. Raises ValueError if another try is no use.
    """
    status = reply.status_code
    content_range = reply.headers.get("Content-Range", "")
    if status == 416 or status == 206 and not content_range.startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)
        return "what was there is part of another file; starting over"
    if status not in (200, 206):
        hint = " (set HF_TOKEN to a token that may read it)" if status in (401, 403) else ""
        raise ValueError(f"HTTP status {status} {reply.reason}{hint}")
    if status == 200:
        have = 0  # a server that knows no Range sends the file from its start
    length = reply.headers.get("Content-Length", "")
    total = have + int(length) if length.isdigit() else size
    if size and total != size:
        raise ValueError(
            f"it is {total} bytes long, {size} were expected (--no-verify takes it as it is)")

    problem = "the connection ended"
    bar = progress(part.stem, total, have)
    with bar, open(part, "ab" if have else "wb") as file:
        try:
            # The raw stream, because a .gz must be saved as it is, whatever the server calls it,
            # and because requests' iter_content loses the last bytes before a break.
            for chunk in reply.raw.stream(1 << 16, decode_content=False):
                have += file.write(chunk)
                bar.update(len(chunk))
            # Not every broken connection is an error for urllib3, so we count the bytes as well.
            if total is None or have >= total:
                return ""
        except urllib3.exceptions.HTTPError as error:
            problem = type(error).__name__
    # What came without its length may be another page, such as a network's login.
    if not length.isdigit():
        part.unlink()
    return f"{problem} after {have} of {total} bytes"
