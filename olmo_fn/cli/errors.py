"""What is wrong, in one line: for every error that the user or the system can mend. Imports no torch."""

from __future__ import annotations

import errno
import re
import zlib
from concurrent.futures import BrokenExecutor

LONGEST = 300  # characters of one word, which an echo of the input may fill
ADVICE = {
    errno.EACCES: "take another folder, or ask for the permission (ls -ld shows who has it)",
    errno.EBUSY: "another program uses it",
    errno.EDQUOT: "your quota there is used up: free some space, or take another folder",
    errno.EEXIST: "something of that name is in the way",
    errno.EFBIG: "the file system takes no file that large; take another folder",
    errno.EINVAL: "the file system there cannot do it; take another folder",
    errno.EIO: "the disk does not answer as it should; take another, and look at dmesg",
    errno.EISDIR: "name a file",
    errno.ELOOP: "its symbolic links lead back to themselves; remove them",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ENOENT: "look for a slip in the name",
    errno.ENOMEM: "there is not enough memory: make the batch, the model or the number of processes smaller",
    errno.ENOSPC: "free some space there, or take another folder",
    errno.ENOTDIR: "a part of the path is a file; take another folder",
    errno.EPERM: "take another folder, or ask for the permission (ls -ld shows who has it)",
    errno.EROFS: "nothing can be written there; take another folder",
    errno.ESTALE: "the network disk has dropped it; try again",
}


def describe(error: BaseException) -> str | None:
    """The line, with the path and what to do; None for an error of the program itself, which deserves its traceback.

    >>> describe(OSError(errno.ENOSPC, "No space left on device", "runs/a/config.yaml"))
    "cannot use 'runs/a/config.yaml': No space left on device; free some space there, or take another folder"
    >>> describe(KeyError("loss"))
    """
    text = str(error)
    match error:
        case UnicodeEncodeError():
            text = f"{error.object[:60]!r} cannot be written as {error.encoding}: character {error.start + 1} has no such form"
        case UnicodeDecodeError():
            text = f"what was read is no {error.encoding} text: byte {error.start} is {error.object[error.start]:#04x}"
        case OSError(errno=int(number), strerror=str(reason)):
            path = error.filename if error.filename2 is None else error.filename2
            what = f"cannot use {_shown(path)}: {reason}" if path is not None else reason
            text = f"{what}; {ADVICE[number]}" if number in ADVICE else what
        case MemoryError():
            text = f"there is not enough memory{f' ({text})' if text else ''}; make batch, model or input smaller"
        case RecursionError():
            text = "what was read is nested too deeply"
        case zlib.error() | EOFError():
            text = f"what was read is compressed, and damaged: {text}"
        case BrokenExecutor():
            text = "a worker process died, as when memory runs out; use fewer workers"
        case RuntimeError() if "home directory" in text:  # pathlib's, of a ~ without $HOME or of an unknown user
            text = "there is no home folder here for ~, or for a cache: set HOME, OLMO_FN_CACHE or --data.cache-dir to a folder"
        case RuntimeError() if text.startswith("Symlink loop"):  # pathlib's, before Python 3.13
            text = f"{text}; {ADVICE[errno.ELOOP]}"
        case RuntimeError() if "can't allocate memory" in text or "out of memory" in text:
            text = f"there is not enough memory ({text.splitlines()[0]}); make the batch or the model smaller"
        case ValueError() | OSError():
            text = text or type(error).__name__
        case _:
            return None
    return one_line(text)


def one_line(text: str) -> str:
    """The text without what a terminal would act on, and with long words cut.

    >>> one_line("--remat " + 400 * "x" + "\\x1b[0m is\\nunknown")
    '--remat xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx… (407 characters) is unknown'
    """
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))
    cut = re.sub(rf"\S{{{LONGEST},}}", lambda word: f"{word[0][:40]}… ({len(word[0]):,} characters)", printable)
    return cut if len(cut) <= 10 * LONGEST else f"{cut[: 10 * LONGEST]} …"


def _shown(path: object) -> str:
    return repr(path.decode(errors="replace") if isinstance(path, bytes) else str(path))
