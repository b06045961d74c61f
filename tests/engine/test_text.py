"""Text encoders and their cache, with a tiny T5 and a sentencepiece vocabulary made on the spot."""

import io
import json
import random
from pathlib import Path
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file
from vidtta.engine.errors import UserError
from vidtta.engine.text.cache import encode_distinct, text_key
from vidtta.engine.text.encoder import EmbeddedText, EncodedText, T5Text, load_text_encoder

WORDS = ["a", "man", "woman", "dog", "rides", "throws", "plays", "the", "violin", "horse", "ball", "slowly", "near"]
WORDS += ["with", "red", "kitchen", "camera", "moves", "left"]
MAX_LENGTH = 16
CHANNELS = 32


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    """A sentencepiece model with T5's ids: 0 pads, 1 ends, 2 is unknown."""
    import sentencepiece

    lines, model = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(lines.choices(WORDS, k=8)) for _ in range(300)),
        model_writer=model,
        vocab_size=48,
        hard_vocab_limit=False,  # few words give fewer pieces
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def t5_folder(vocabulary, tmp_path_factory) -> Path:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=160,
        d_model=CHANNELS,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    folder = tmp_path_factory.mktemp("t5")
    T5EncoderModel(config).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(vocabulary)
    return folder


@pytest.fixture
def t5_copy(t5_folder, tmp_path) -> Path:
    """A folder of one's own to damage."""
    for path in t5_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def t5(t5_folder) -> T5Text:
    return T5Text(str(t5_folder), max_length=MAX_LENGTH)


def direct_states(folder: Path, ids: list[int]) -> torch.Tensor:
    """What transformers gives for these ids alone, without padding."""
    from transformers import T5EncoderModel

    with torch.no_grad():
        return T5EncoderModel.from_pretrained(folder)(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "a man rides the horse",
        "the  dog \n plays ",
        "\u00fcber \ufb01ne violin",  # an unknown letter, and one that the vocabulary's own rule spells out
        "",
        " ".join(WORDS),  # longer than the limit
    ],
)
def test_t5_equals_sentencepiece_and_a_direct_call(t5, t5_folder, vocabulary, prompt):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary).encode(prompt)
    ids = [*pieces[: MAX_LENGTH - 1], 1]
    (text,) = t5.encode([prompt])
    assert text.prompt == prompt
    assert text.n_tokens == len(ids)
    assert text.embedding.shape == (len(ids), CHANNELS)
    assert text.embedding.dtype == torch.float32
    assert not text.embedding.requires_grad
    torch.testing.assert_close(text.embedding, direct_states(t5_folder, ids), rtol=1e-5, atol=1e-5)


def test_t5_tokenises_like_the_published_model(t5, monkeypatch):
    """Padded to the limit, with the mask, one prompt a call."""
    calls = []
    model = t5._model
    monkeypatch.setattr(t5, "_model", lambda **inputs: calls.append(inputs) or model(**inputs))
    t5.encode(["a man", "the dog"])
    assert [list(call["input_ids"].shape) for call in calls] == [[1, MAX_LENGTH]] * 2
    mask = calls[0]["attention_mask"][0]
    n_tokens = int(mask.sum())
    assert mask.tolist() == [1] * n_tokens + [0] * (MAX_LENGTH - n_tokens)
    assert calls[0]["input_ids"][0, n_tokens - 1 :].tolist() == [1] + [0] * (MAX_LENGTH - n_tokens)


def test_t5_runs_distinct_prompts_once(t5, monkeypatch):
    calls, progress = [], []
    model = t5._model
    monkeypatch.setattr(t5, "_model", lambda **inputs: calls.append(1) or model(**inputs))
    texts = t5.encode(["a man", "the dog", "a man"], progress.append)
    assert [text.prompt for text in texts] == ["a man", "the dog", "a man"]
    assert texts[0] is texts[2]
    assert len(calls) == 2
    assert progress == [1, 2]


def test_t5_reads_the_published_layout(t5, t5_copy):
    """Pickled shards with an index, and the tokenizer settings of transformers 4 beside spiece.model."""
    weights = load_file(t5_copy / "model.safetensors")
    (t5_copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, t5_copy / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (t5_copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {
        "additional_special_tokens": extra,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (t5_copy / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {**special, "extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (t5_copy / "tokenizer_config.json").write_text(json.dumps(settings))

    prompts = ["a man rides the horse", " ".join(WORDS)]
    published = T5Text(str(t5_copy), max_length=MAX_LENGTH).encode(prompts)
    for ours, theirs in zip(t5.encode(prompts), published, strict=True):
        assert torch.equal(ours.embedding, theirs.embedding)

    (t5_copy / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"lacks a part of the weights \(pytorch_model-00002-of-00002\.bin\)"):
        T5Text(str(t5_copy))


def test_t5_dtype_and_close(t5_folder):
    encoder = T5Text(str(t5_folder), dtype=torch.bfloat16, max_length=MAX_LENGTH)
    assert encoder.encode(["a man"])[0].embedding.dtype == torch.bfloat16
    encoder.close()
    encoder.close()
    with pytest.raises(AssertionError, match="encode after close"):
        encoder.encode(["a man"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"lacks the model's settings \(config\.json\)"),
        ("spiece.model", r"lacks the tokenizer \(tokenizer\.json or spiece\.model\)"),
        ("model.safetensors", r"lacks the weights \(model\.safetensors or .*\); complete it, or run vidtta fetch t5"),
    ],
)
def test_missing_files(t5_copy, name, message):
    (t5_copy / name).unlink()
    with pytest.raises(UserError, match=message):
        T5Text(str(t5_copy))


def test_incomplete_weights(t5_copy):
    """transformers would put random numbers in their place."""
    weights = load_file(t5_copy / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, t5_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of the encoder's tensors .* encoder\.block\.1\.layer\.0\.SelfAttention\.q"):
        T5Text(str(t5_copy))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["DeepFloyd/t5-v1_1-xxl", "./no/such/folder", "embeded"])
def test_absent_model(hub_cache, source):
    with pytest.raises(UserError, match=f"`{source}` is neither a file .* run `vidtta fetch t5`"):
        load_text_encoder(source, channels=CHANNELS, max_length=MAX_LENGTH, device="cpu", dtype=torch.float32)


def test_hub_id_resolves_in_the_local_cache(hub_cache, t5, t5_folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--tiny--t5"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in t5_folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    encoder = load_text_encoder("tiny/t5", channels=CHANNELS, max_length=MAX_LENGTH, device="cpu", dtype=torch.float32)
    assert torch.equal(encoder.encode(["a man"])[0].embedding, t5.encode(["a man"])[0].embedding)
    key = text_key("tiny/t5", channels=CHANNELS, max_length=MAX_LENGTH, dtype=torch.float32)
    assert key == f"t5:tiny/t5@{commit}, 32 channels, 16 tokens, torch.float32"


def test_width_must_be_the_models(t5_folder):
    with pytest.raises(UserError, match="its width is 32; this model takes 4096"):
        load_text_encoder(str(t5_folder), channels=4096, max_length=300, device="cpu", dtype=torch.float32)


def test_embedded_text():
    encoder = load_text_encoder("embedded", channels=8, max_length=5, device="cpu", dtype=torch.float32)
    assert isinstance(encoder, EmbeddedText)
    first, second, empty, long = encoder.encode(["The dog's Ball!", "ball; THE dog's", "", "a b c d e f"])
    assert first.embedding.shape == (4, 8)
    assert torch.equal(first.embedding[[2, 0, 1, 3]], second.embedding)  # words alone count, case and signs do not
    assert torch.equal(empty.embedding, first.embedding[3:])  # the end token
    assert long.n_tokens == 5
    assert torch.equal(long.embedding[4], empty.embedding[0])
    assert torch.equal(long.embedding[:1], encoder.encode(["a"])[0].embedding[:1])
    assert not torch.equal(first.embedding[0], first.embedding[1])


def test_embedded_table_is_fixed():
    """Results carry text_key's "embedded-1"; if these numbers change, so must that name."""
    (text,) = EmbeddedText(channels=4).encode(["dog"])
    dog = [0.21161026, -1.04159689, 0.08778869, -0.01927195]
    end = [0.48202768, -0.20948496, -0.78703034, -0.56353301]
    torch.testing.assert_close(text.embedding, torch.tensor([dog, end]), rtol=0, atol=1e-6)


def test_embedded_table_from_a_file(tmp_path):
    table = torch.randn(1025, 8)
    save_file({"table": table}, tmp_path / "table.safetensors")
    source = f"embedded:{tmp_path / 'table.safetensors'}"
    encoder = load_text_encoder(source, channels=8, max_length=300, device="cpu", dtype=torch.bfloat16)
    (text,) = encoder.encode(["dog"])
    assert torch.equal(text.embedding, table[[crc32(b"dog") % 1024, 1024]].bfloat16())

    with pytest.raises(UserError, match=r"the table is \[1025, 8\]; this model takes \[1025, 16\]"):
        load_text_encoder(source, channels=16, max_length=300, device="cpu", dtype=torch.float32)
    save_file({"rows": table}, tmp_path / "table.safetensors")
    with pytest.raises(UserError, match='not a safetensors file with a tensor "table"'):
        load_text_encoder(source, channels=8, max_length=300, device="cpu", dtype=torch.float32)
    with pytest.raises(UserError, match="there is no such file"):
        load_text_encoder("embedded:absent", channels=8, max_length=300, device="cpu", dtype=torch.float32)


class CountingEncoder:
    """Encodes a prompt as its own length and counts; can be made to fail on one prompt."""

    def __init__(self, fails_on: str | None = None):
        self.fails_on = fails_on
        self.encoded, self.closed = [], 0

    def encode(self, prompts, progress=None):
        if self.fails_on in prompts:
            raise RuntimeError("out of memory")
        self.encoded += prompts
        return [EncodedText(p, torch.full((len(p), 4), float(len(p)), dtype=torch.bfloat16)) for p in prompts]

    def close(self):
        self.closed += 1


def forbidden():
    pytest.fail("an encoder was built although every prompt is cached")


def test_cache(tmp_path):
    encoder, progress = CountingEncoder(), []
    first = encode_distinct(lambda: encoder, ["a man", "dog", "a man"], tmp_path, "key", progress.append)
    assert encoder.encoded == ["a man", "dog"]
    assert (encoder.closed, progress) == (1, [1, 2])
    assert len(list(tmp_path.iterdir())) == 2
    again = encode_distinct(forbidden, ["dog", "a man"], tmp_path, "key")
    assert list(again) == ["dog", "a man"]
    for prompt, text in again.items():
        assert text.prompt == prompt
        assert text.embedding.dtype == torch.bfloat16
        assert torch.equal(text.embedding, first[prompt].embedding)

    other = CountingEncoder()
    encode_distinct(lambda: other, ["dog", "a cat"], tmp_path, "key")
    assert other.encoded == ["a cat"]
    encode_distinct(lambda: other, ["dog"], tmp_path, "another key")
    assert other.encoded == ["a cat", "dog"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "exchanged"])
def test_damaged_cache_files_are_redone(tmp_path, damage):
    encode_distinct(CountingEncoder, ["dog"], tmp_path, "key")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "exchanged":  # another prompt's result under this name
        encode_distinct(CountingEncoder, ["a cat"], tmp_path / "other", "key")
        next((tmp_path / "other").iterdir()).replace(path)
    else:
        broken = {"truncated": whole[:-3], "empty": b"", "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}
        path.write_bytes(broken[damage])
    encoder = CountingEncoder()
    result = encode_distinct(lambda: encoder, ["dog"], tmp_path, "key")
    assert encoder.encoded == ["dog"]
    assert torch.equal(result["dog"].embedding, torch.full((3, 4), 3.0, dtype=torch.bfloat16))
    encode_distinct(forbidden, ["dog"], tmp_path, "key")


def test_a_failing_encoder_is_closed_and_what_was_done_is_kept(tmp_path):
    encoder = CountingEncoder(fails_on="b")
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_distinct(lambda: encoder, ["a", "b", "c"], tmp_path, "key")
    assert encoder.closed == 1
    assert list(encode_distinct(forbidden, ["a"], tmp_path, "key")) == ["a"]


def key_of(folder: Path, **changes) -> str:
    return text_key(str(folder), **{"channels": CHANNELS, "max_length": MAX_LENGTH, "dtype": torch.float32, **changes})


def test_text_key_of_a_directory(t5_folder, t5_copy):
    key = key_of(t5_folder)
    assert key_of(t5_copy) == key  # the place does not count
    assert len({key, key_of(t5_copy, max_length=300), key_of(t5_copy, dtype=torch.bfloat16)}) == 3
    for name in ("config.json", "spiece.model", "model.safetensors"):
        content = (t5_copy / name).read_bytes()
        (t5_copy / name).write_bytes(content + b" ")
        assert key_of(t5_copy) != key, name
        (t5_copy / name).write_bytes(content)
    assert key_of(t5_copy) == key
    (t5_copy / "spiece.model").unlink()
    with pytest.raises(UserError, match="lacks the tokenizer"):
        key_of(t5_copy)


def test_text_key_of_the_embedded_text(tmp_path):
    arguments = {"channels": 8, "max_length": 300, "dtype": torch.float32}
    assert text_key("embedded", **arguments) == "embedded-1, 8 channels, 300 tokens, torch.float32"
    keys = set()
    for seed in range(2):
        torch.manual_seed(seed)
        save_file({"table": torch.randn(1025, 8)}, tmp_path / "table.safetensors")
        keys.add(text_key(f"embedded:{tmp_path / 'table.safetensors'}", **arguments))
    assert len(keys) == 2
