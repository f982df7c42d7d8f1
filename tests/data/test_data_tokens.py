"""Token files: every bad file gets one line that names it and says what to do."""

import os
import resource

import numpy as np
import pytest

from olmo_fn.data.instances.fixed import Windows
from olmo_fn.data.tokens import check_vocab, expand, open_masks, open_tokens, read_tokens, smallest_dtype


def write(path, values, dtype="<u2"):
    np.array(values, dtype).tofile(path)
    return str(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_every_type_reads_its_largest_value(tmp_path, dtype):
    top = np.iinfo(dtype).max
    file = open_tokens(write(tmp_path / "t.npy", [1, top, 3], dtype), dtype)
    assert file.num_tokens == 3
    assert read_tokens(file).tolist() == [1, top, 3]
    assert read_tokens(file, 1, 2).tolist() == [top]
    assert read_tokens(file, 1, 9).tolist() == [top, 3]
    assert read_tokens(file).dtype == dtype


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (2, "uint8"),
        (256, "uint8"),
        (257, "uint16"),
        (65536, "uint16"),
        (65537, "uint32"),
        (2**32 + 1, "uint64"),
    ],
)
def test_smallest_dtype(vocab_size, dtype):
    assert smallest_dtype(vocab_size) == dtype


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the token file '.*/no\.npy': No such file"):
        open_tokens(str(tmp_path / "no.npy"), "uint16")
    (tmp_path / "empty.npy").touch()
    with pytest.raises(ValueError, match=r"empty\.npy' is empty; write one with olmo-fn tokenize"):
        open_tokens(str(tmp_path / "empty.npy"), "uint16")
    (tmp_path / "odd.npy").write_bytes(bytes(6))
    with pytest.raises(ValueError, match=r"odd\.npy' has 6 bytes.* 4 bytes of uint32; .* uint8 or uint16 would fit"):
        open_tokens(str(tmp_path / "odd.npy"), "uint32")
    np.save(tmp_path / "numpy.npy", np.arange(4))
    with pytest.raises(ValueError, match=r"numpy\.npy' has a NumPy header, of an array"):
        open_tokens(str(tmp_path / "numpy.npy"), "uint16")


def test_expand_keeps_order_and_sorts_globs(tmp_path):
    a, b, c = (write(tmp_path / f"{n}.npy", [1]) for n in "abc")
    assert expand([c, str(tmp_path / "[ab].npy")]) == (c, a, b)
    with pytest.raises(ValueError, match=r"no token file matches '.*x-\*\.npy'"):
        expand([str(tmp_path / "x-*.npy")])
    with pytest.raises(ValueError, match=r"is a folder; name the token files in it: \S+/a\.npy \S+/b\.npy \S+/c\.npy$"):
        expand([str(tmp_path)])


def test_a_name_with_glob_characters_is_still_a_name(tmp_path):
    path = write(tmp_path / "part-[1].npy", [1])
    assert expand([path]) == (path,)


def test_check_vocab_names_file_offset_value(tmp_path):
    good = open_tokens(write(tmp_path / "good.npy", [1, 2, 99]), "uint16")
    bad = open_tokens(write(tmp_path / "bad.npy", [1, 100, 2, 300]), "uint16")
    check_vocab([good, bad], 301)
    with pytest.raises(ValueError, match=r"token 100 at offset 1 of '.*bad\.npy' \(read as uint16\) is not below 100"):
        check_vocab([good, bad], 100)


def test_check_vocab_finds_the_first_in_a_late_chunk(tmp_path):
    values = np.zeros((1 << 22) + 10, np.uint16)
    values[-3] = 7
    file = open_tokens(write(tmp_path / "long.npy", values), "uint16")
    with pytest.raises(ValueError, match=f"token 7 at offset {(1 << 22) + 7:,} "):
        check_vocab([file], 7)


def test_what_the_scan_leaves_out_is_found_on_reading(tmp_path):
    values = np.zeros(1000, np.uint16)
    values[900] = 50
    file = open_tokens(write(tmp_path / "t.npy", values), "uint16")
    check_vocab([file], 50, scan_bytes=1000)
    windows = Windows((file,), 10, 50)
    assert windows.read(np.array([89]))["input_ids"].max() == 0
    with pytest.raises(ValueError, match=r"token 50 at offset 900 of '.*t\.npy'"):
        windows.read(np.array([3, 90]))


def test_a_uint64_that_no_int64_holds_is_refused(tmp_path):
    file = open_tokens(write(tmp_path / "t.npy", [0, 2**64 - 1], "uint64"), "uint64")
    with pytest.raises(ValueError, match="token 18446744073709551615 at offset 1 "):
        Windows((file,), 2, 50).read(np.array([0]))


def test_label_masks_must_match(tmp_path):
    files = tuple(open_tokens(write(tmp_path / f"{n}.npy", [1, 2, 3]), "uint16") for n in "ab")
    masks = [write(tmp_path / f"{n}.mask.npy", [1, 0, 1], bool) for n in "ab"]
    assert len(open_masks(masks, files)) == 2
    with pytest.raises(ValueError, match="1 label mask files for 2 token files"):
        open_masks(masks[:1], files)
    short = write(tmp_path / "short.npy", [1, 0], bool)
    with pytest.raises(ValueError, match=r"short\.npy' has 2 entries, '.*b\.npy' has 3 tokens"):
        open_masks([masks[0], short], files)


def test_more_files_than_file_descriptors(tmp_path):
    """A mix has tens of thousands of files; only the recently used stay open."""
    files = tuple(open_tokens(write(tmp_path / f"{i:04}.npy", [i, i]), "uint16") for i in range(700))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 300, limits[1]))
    try:
        ids = Windows(files, 2, 700).read(np.arange(700))["input_ids"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ids[:, 0].tolist() == list(range(700))
