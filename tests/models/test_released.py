"""The authors' .pth files and archive, on stand-ins: the decoder in torch's own modules, a web server on this
machine."""

import errno
import functools
import hashlib
import http.server
import io
import os
import stat
import threading
import zipfile

import pytest
import torch
from conftest import spread
from torch import nn
from transformers import CLIPModel

from clipseg_repro import Segmenter, downloads
from clipseg_repro.errors import InputError
from clipseg_repro.models import released
from clipseg_repro.models.loading import load_model
from clipseg_repro.prompts import to_pixels

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4306645\n"


class ReleasedDecoder(nn.Module):
    """CLIPSeg's decoder from its description, in torch's modules, whose parts are named as in the authors' files."""

    def __init__(self, width, refined, layers=3, clip_width=64):
        super().__init__()
        self.film_mul, self.film_add = nn.Linear(48, width), nn.Linear(48, width)
        self.reduce = nn.Linear(clip_width, width)  # in the files, never used
        self.reduces = nn.ModuleList(nn.Linear(clip_width, width) for _ in range(layers))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, nhead=4) for _ in range(layers))
        self.trans_conv = nn.ConvTranspose2d(width, 1, 16, stride=16)
        if refined:
            up = functools.partial(nn.ConvTranspose2d, kernel_size=4, stride=4)
            convolution = nn.Conv2d(width, width, 3, padding=1)
            self.trans_conv = nn.Sequential(convolution, nn.ReLU(), up(width, width // 2), nn.ReLU(), up(width // 2, 1))

    def forward(self, activations, condition):
        """(S, S) logits of one image's activations, (N, C) each with the shallowest first, under one condition."""
        tokens = 0
        for i, activation in enumerate(reversed(activations)):
            tokens = tokens + self.reduces[i](activation)
            if i == 0:
                tokens = self.film_mul(condition) * tokens + self.film_add(condition)
            tokens = self.blocks[i](tokens)
        side = round((len(tokens) - 1) ** 0.5)
        return self.trans_conv(tokens[1:].T.unflatten(1, (side, side))[None])[0, 0]


def released_file(path, width=16, refined=False, dtype=torch.float32, more=None, **options):
    """Save a decoder as the authors did and give it back."""
    torch.manual_seed(0)
    decoder = spread(ReleasedDecoder(width, refined, **options)).to(dtype)
    torch.save(decoder.state_dict() | (more or {}), path)
    return decoder.float().eval()


@pytest.mark.parametrize(
    ("width", "refined", "dtype"), [(16, False, torch.float32), (64, False, torch.float16), (64, True, torch.float16)]
)
def test_logits_are_those_of_the_released_decoder(width, refined, dtype, tiny_clip, tmp_path, picture):
    path = tmp_path / "rd.pth"
    decoder = released_file(path, width, refined, dtype, more={"clip_model.logit_scale": torch.ones(())})
    model, processor = load_model(path, clip=tiny_clip)
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    segmenter = Segmenter(model, processor, device="cpu")
    segmenter.set_image(picture)
    clip = CLIPModel.from_pretrained(tiny_clip)
    pixels = to_pixels([picture], processor.image_processor)
    assert pixels.shape == (1, 3, 352, 352)
    with torch.no_grad():
        hidden = clip.vision_model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        tokens = processor.tokenizer("a small cat", return_tensors="pt")
        condition = clip.get_text_features(**tokens).pooler_output[0]
        # hidden_states begins with the embeddings: block i, counted from 0, gives number i + 1
        expected = decoder([hidden[i + 1][0] for i in (3, 6, 9)], condition)
    assert expected.std() > 0.1
    torch.testing.assert_close(segmenter.logits("a small cat")[0], expected, atol=2e-5, rtol=0)


class _Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def _pickle(path):
    torch.save({"film_mul.weight": _Executes()}, path)


def _truncated(path):
    released_file(path)
    path.write_bytes(path.read_bytes()[:-2000])


def _other(path):
    torch.save({f"layer{i}.conv.weight": torch.zeros(1) for i in range(20)}, path)


def _one_missing(path):
    decoder = released_file(path)
    torch.save({k: v for k, v in decoder.state_dict().items() if k != "blocks.1.norm2.bias"}, path)


def _as_text(path):
    released_file(path)
    path.write_text(path.read_bytes().decode(errors="replace"), newline="")


def _changed(key, change):
    def write(path):
        decoder = released_file(path)
        torch.save(decoder.state_dict() | {key: change(decoder.state_dict()[key])}, path)

    return write


BIAS = "film_mul.bias"


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_pickle, "would execute code"),
        (_truncated, r"a zip archive cut off after \d+ bytes.*CIDAS/clipseg-rd64-refined"),
        (_as_text, "converted as if it were"),
        (lambda path: path.write_bytes(b""), r"\(empty\)"),
        (lambda path: path.write_bytes(POINTER), r"a Git LFS pointer; `git lfs pull`.*CIDAS/clipseg-rd64-refined"),
        (lambda path: path.write_text("<html>"), "a web page"),
        (lambda path: path.write_bytes(os.urandom(1000)), "damaged or no .pth file"),
        (lambda path: torch.save({0: torch.zeros(1)}, path), "no plain table of named tensors"),
        (_changed(BIAS, torch.Tensor.to_sparse), "film_mul.bias is a tensor of torch.sparse_coo"),
        (_changed(BIAS, torch.Tensor.long), "film_mul.bias is a tensor of torch.int64"),
        (
            _changed(BIAS, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
            "film_mul.bias is .* torch.qint8",
        ),
        (_changed(BIAS, lambda t: t.to("meta")), "film_mul.bias is a tensor of"),
        (_changed(BIAS, lambda t: t[0]), "do not fit together"),
        (_changed("blocks.1.norm1.bias", lambda t: t[0]), "do not fit together"),
        (_changed("blocks.0.linear1.bias", lambda t: t[:0]), "do not fit together"),
        (_changed(BIAS, lambda t: t * torch.inf), r"NaN or infinite numbers \['decoder.film_mul.bias'\]"),
        (lambda path: torch.save([torch.zeros(1)], path), "hold a list"),
        (lambda path: torch.save({"state_dict": {}}, path), "no plain table of named tensors"),
        (_other, r"missing blocks.0.* and \d+ more, unexpected layer0.conv.weight, .* and 12 more"),
        (_one_missing, "missing blocks.1.norm2.bias, unexpected nothing"),
        (lambda path: released_file(path, more={"reduce_cond.bias": torch.zeros(1)}), "unexpected reduce_cond.bias:"),
        (lambda path: released_file(path, layers=2), "2 decoder layers"),
        (
            lambda path: released_file(path, clip_width=32),
            r"do not fit together .*\[16, 32\].*\[16, 64\].*need CLIP openai",
        ),
    ],
)
def test_other_files_are_refused(write, reason, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights.pth")
    with pytest.raises(InputError, match=reason) as caught:
        load_model(tmp_path / "weights.pth", clip=tiny_clip)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_clip_of_another_kind_is_refused(tiny_folder, tiny_clip, tmp_path):
    released_file(tmp_path / "rd.pth")
    with pytest.raises(InputError, match="holds a 'clipseg' model: give one of model_type 'clip'"):
        load_model(tmp_path / "rd.pth", clip=tiny_folder)
    with pytest.raises(InputError, match="holds a 'clip' model: give one of model_type 'clipseg'"):
        load_model(tiny_clip)


def zipped(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


WEIGHTS = {name: os.urandom(30_000) for name in released.FILES}
GOOD = zipped(
    **{
        "./": b"",
        "clipseg_weights/": b"",
        "clipseg_weights/notes.txt": b"",
        **{f"clipseg_weights/{k}": v for k, v in WEIGHTS.items()},
    }
)


@pytest.fixture
def server(monkeypatch):
    """A web server for the archive. `sends`: bytes of each answer that arrive before the line is cut, None for all;
    `refuses`: a status, and a content type of its answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if server.refuses:
                self.send_response(server.refuses[0])
                self.send_header("Content-Type", server.refuses[1])
                self.end_headers()
                return self.wfile.write(b"<html>not what you wanted</html>")
            start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.resumes else 0
            server.starts.append(start)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
            self.send_header("Content-Length", str(len(server.content) - start))
            self.end_headers()
            self.wfile.write(server.content[start:][: server.sends.pop(0) if server.sends else None])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.sends, server.resumes, server.starts, server.refuses = GOOD, [], True, [], None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(released, "ARCHIVE", f"http://127.0.0.1:{server.server_port}/download")
    monkeypatch.setattr(released, "FILES", {name: hashlib.sha256(data).hexdigest() for name, data in WEIGHTS.items()})
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def assert_complete(folder):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == WEIGHTS


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_is_resumed(server, tmp_path, resumes):
    server.sends, server.resumes = [40_000], resumes
    with pytest.raises(InputError, match=r"run the same command again, or .*; 32768 bytes are kept"):
        released.fetch_weights(tmp_path / "weights")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights.zip.part"]
    paths = released.fetch_weights(tmp_path / "weights")
    assert [path.name for path in paths] == list(released.FILES)
    assert_complete(tmp_path / "weights")
    assert server.starts == [0, 32_768 if resumes else 0]
    released.fetch_weights(tmp_path / "weights")
    assert len(server.starts) == 2  # nothing left to fetch


@pytest.mark.parametrize(
    ("refuses", "reason"),
    [
        ((404, "text/html"), "404 Not Found.*this address is dead or closed"),
        ((503, "text/plain"), "503 Service Unavailable.*try again later"),
        ((200, "text/html; charset=utf-8"), "a web page was sent"),
    ],
)
def test_a_dead_address_names_the_living_source_and_keeps_what_arrived(server, tmp_path, refuses, reason):
    server.sends = [40_000]
    with pytest.raises(InputError, match="check the network"):
        released.fetch_weights(tmp_path)
    server.refuses = refuses
    with pytest.raises(InputError, match=f"{reason}.*CIDAS/clipseg-rd64-refined.*32768 bytes are kept") as caught:
        released.fetch_weights(tmp_path)
    assert "check the network" not in str(caught.value)
    server.refuses = None
    released.fetch_weights(tmp_path)
    assert_complete(tmp_path)
    assert server.starts == [0, 32_768]


def test_damaged_files_are_fetched_again(server, tmp_path):
    released.fetch_weights(tmp_path)
    (tmp_path / "rd16-uni.pth").write_bytes(POINTER)
    released.fetch_weights(tmp_path)
    assert_complete(tmp_path)


def test_a_full_disk_does_not_cost_the_download(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"cannot write to .*No space left"):
        patched.setattr("pathlib.Path.write_bytes", full)
        released.fetch_weights(tmp_path)
    released.fetch_weights(tmp_path)
    assert_complete(tmp_path)
    assert server.starts == [0]


def test_no_server_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match=r"cannot fetch http://127.0.0.1:9/a.*check the network") as caught:
        downloads.download("http://127.0.0.1:9/a", tmp_path / "a", "do without")
    assert "\n" not in str(caught.value)


def _link():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in released.FILES:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/hostname")
    return content.getvalue()


def _flipped():
    position = GOOD.index(WEIGHTS["rd16-uni.pth"])
    return GOOD[:position] + bytes([GOOD[position] ^ 1]) + GOOD[position + 1 :]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(**{"../rd64-uni.pth": b"x", **WEIGHTS}), r"point outside it \('../rd64-uni.pth'\)"),
        (zipped(**{"/tmp/rd64-uni.pth": b"x", **WEIGHTS}), "point outside it"),
        (_link(), "point outside it"),
        (zipped(**{"rd64-uni.pth": b"x"}), "lacks rd64-uni-refined.pth, rd16-uni.pth"),
        (GOOD[:-3000], "a zip archive cut off after"),
        (_flipped(), "damaged.*rd16-uni.pth"),
        (zipped(**WEIGHTS | {"rd16-uni.pth": b"another"}), "the checksum of rd16-uni.pth is another"),
        (b"<html>Please log in</html>", "it is a web page"),
        (POINTER, "a Git LFS pointer"),
    ],
)
def test_bad_archives_are_refused(server, tmp_path, content, reason):
    server.content = content
    folder = tmp_path / "weights"
    with pytest.raises(InputError, match=reason):
        released.fetch_weights(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert not (folder / "weights.zip").exists()
    assert not (folder / "rd16-uni.pth").exists()
    server.content = GOOD  # and the next run is not spoilt
    released.fetch_weights(folder)
    assert_complete(folder)
