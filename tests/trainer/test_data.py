"""Documents, tokens, cache, split and order: deterministic, and the same for any number of ranks."""

import json

import numpy as np
import pytest

from pypar.trainer import cache, data
from pypar.trainer.documents import find_files
from pypar.trainer.errors import TrainError
from pypar.trainer.tokens import ByteTokens, load_tokens


def make_cache(documents: list[int]) -> cache.TokenCache:
    """Documents of these lengths; token i of the whole is i."""
    ends = np.cumsum(documents)
    return cache.TokenCache(np.arange(ends[-1], dtype=np.uint32), ends, {})


def test_finds_text_recursively_and_skips_the_rest(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "a" / "b" / "deep.txt").write_text("grüße")
    (tmp_path / "a" / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "latin1.txt").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    assert len(find_files([str(tmp_path)])) == 4
    loaded = cache.load(cache.build([str(tmp_path)], ByteTokens(), tmp_path / ".cache"))
    assert bytes(loaded.tokens[:-1].astype(np.uint8)).decode() == "grüße"
    assert loaded.tokens[-1] == 256 and loaded.meta["num_documents"] == 1
    assert loaded.meta["skipped"] == {"binary": 2, "empty": 1}


def test_default_data_is_the_standard_library():
    files = find_files([])
    assert len(files) > 100 and all(path.suffix == ".py" for path in files)
    assert not any({"test", "site-packages"} & set(path.parts[-3:]) for path in files)


def test_cache_is_reused_until_a_file_changes(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("one")
    first = cache.build([str(source)], ByteTokens(), tmp_path / "cache")
    stamp = (first / "tokens.bin").stat().st_mtime_ns
    assert cache.build([str(source)], ByteTokens(), tmp_path / "cache") == first
    assert (first / "tokens.bin").stat().st_mtime_ns == stamp
    source.write_text("another")
    assert cache.build([str(source)], ByteTokens(), tmp_path / "cache") != first
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_damaged_cache_is_an_error_that_names_its_folder(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    built = cache.build([str(tmp_path / "a.txt")], ByteTokens(), tmp_path / "cache")
    (built / "tokens.bin").write_bytes(b"")
    with pytest.raises(TrainError, match=f"{built.name} is damaged"):
        cache.load(built)


def test_tokenizers_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "day": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokens = load_tokens(str(tmp_path / "words.json"))
    assert (tokens.vocab_size, tokens.end) == (4, 3)
    (tmp_path / "a.txt").write_text("good day")
    loaded = cache.load(cache.build([str(tmp_path / "a.txt")], tokens, tmp_path / "cache"))
    assert loaded.tokens.tolist() == [1, 2, 3] and tokens.decode(loaded.tokens.tolist()) == "good day"
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(TrainError, match="not a tokenizers JSON file"):
        load_tokens(str(tmp_path / "wrong.json"))


def test_stream_reads_across_pieces():
    stream = data.Stream(np.arange(100), np.array([50, 0, 90]), np.array([5, 0, 10]), seq_len=4)
    assert stream.num_tokens == 15 and stream.num_sequences == 3
    read = [stream.sequence(index).tolist() for index in range(3)]
    assert read == [[50, 51, 52, 53, 54], [54, 90, 91, 92, 93], [93, 94, 95, 96, 97]]


@pytest.mark.parametrize("lengths", [[20] * 50, [1000], [5, 900, 5, 90], [3] * 400])
def test_split_holds_out_other_tokens_than_it_trains_on(lengths):
    stored = make_cache(lengths)
    train, val = data.split(stored, seq_len=8, val_fraction=0.05, seed=3)
    seen = [set(stream.sequence(i)[:-1]) for stream in (train, val) for i in range(stream.num_sequences)]
    assert sum(map(len, seen)) == len(set().union(*seen)), "a token is in two sequences"
    assert train.num_tokens + val.num_tokens == sum(lengths)
    assert 0.02 * sum(lengths) <= val.num_tokens <= 0.2 * sum(lengths)
    again = data.split(stored, seq_len=8, val_fraction=0.05, seed=3)[0]
    assert again.sequence(0).tolist() == train.sequence(0).tolist()


def test_split_depends_on_the_seed():
    stored = make_cache([20] * 50)
    one, other = (data.split(stored, 8, 0.05, seed)[1].sequence(0).tolist() for seed in (0, 1))
    assert one != other


def test_too_short_data_names_a_length_that_works():
    stored = make_cache([100])
    with pytest.raises(TrainError, match="--seq-len 49 or less"):
        data.split(stored, 64, 0.05, 0)
    train, val = data.split(stored, 49, 0.05, 0)
    assert train.num_sequences == val.num_sequences == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_one_order(world_size):
    order = data.Order(13, seed=5)
    taken = []
    for step in range(4):
        batch = order.take(step * 7, 7)
        shares = [data.share(batch, rank, world_size) for rank in range(world_size)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert [index for part in shares for index in part] == batch
        taken += batch
    assert sorted(taken[:13]) == sorted(taken[13:26]) == list(range(13)), "an epoch holds every sequence once"
    assert taken[:13] != taken[13:26]
    assert data.Order(13, seed=5).take(9, 6) == taken[9:15], "any position can be reached directly"


def test_cache_meta_is_json(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    built = cache.build([str(tmp_path / "a.txt")], ByteTokens(), tmp_path / "cache")
    meta = json.loads((built / "meta.json").read_text())
    assert meta["num_tokens"] == 4 and len(meta["sha256"]) == 64
