"""llama.cpp in a process of its own: `python -m fastft.tools.gguf.llama_cpp_worker FOLDER` answers FOLDER/job.json in
FOLDER/answer.json, logits.npy and one file a stage. A failed assertion in its C++ ends this process alone; what it sets
for its process is set here alone.

Activations are read where llama.cpp's scheduler shows them, under the names that its graphs give them; keys and values
are cached in float32, so that what is measured is the file."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ERROR = 4  # ggml's level


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        print(text.decode(errors="replace").strip(), file=sys.stderr, flush=True)


class LlamaCpp:
    """One file, loaded for the CPU."""

    def __init__(self, path: str, positions: int, threads: int, watched: list[str]):
        import llama_cpp as lib  # pyright: ignore[reportMissingImports]

        from fastft.compat.llama_cpp_private import ggml

        self.log = lib.llama_log_callback(_log)  # kept alive
        lib.llama_log_set(self.log, ctypes.c_void_p(0))
        self.ggml = ggml()
        self.ggml.ggml_get_name.restype, self.ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self.ggml.ggml_nbytes.restype, self.ggml.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self.ggml.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
        ]
        self.lib, self.watched, self.seen = lib, set(watched), {}
        lib.llama_backend_init()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the file")
        self.vocab: Any = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        context = lib.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = positions
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = lib.GGML_TYPE_F32
        context.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.callback = lib.ggml_backend_sched_eval_callback(self._look)  # kept alive
        if watched:
            context.cb_eval = self.callback
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context for the file")

    def _look(self, tensor: int, ask: bool, _: Any) -> bool:
        name = self.ggml.ggml_get_name(tensor).decode()
        if ask or name not in self.watched:
            return name in self.watched
        values = np.empty(self.ggml.ggml_nbytes(tensor) // 4, dtype=np.float32)
        self.ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        self.seen[name] = values
        return True

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text in which special tokens are recognised; `special`: with what is put before and after it."""
        data = text.encode()
        room = len(data) + 8
        ids = (self.lib.llama_token * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, special, True)
        return list(ids[:count])

    def logits(self, ids: list[int], all_of_them: bool = True, fresh: bool = True) -> np.ndarray:
        """[positions, vocabulary], or of the last position; after what went before unless `fresh`."""
        if fresh:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            self.at = 0
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self.at + i, 1, 0
                batch.logits[i] = all_of_them or i == len(ids) - 1
            if (code := self.lib.llama_decode(self.context, batch)) != 0:
                raise RuntimeError(f"llama.cpp cannot run the file (llama_decode gave {code})")
        finally:
            self.lib.llama_batch_free(batch)
        self.at += len(ids)
        rows = range(len(ids)) if all_of_them else [len(ids) - 1]
        get = lambda i: np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.size,)).copy()
        return np.stack([get(i) for i in rows])

    def greedy(self, ids: list[int], new: int, stops: list[int]) -> list[int]:
        """At most `new` ids after `ids`, up to one of `stops`, which is among them."""
        found: list[int] = []
        logits = self.logits(ids, False)
        while len(found) < new:
            found.append(int(logits[0].argmax()))
            if found[-1] in stops:
                break
            logits = self.logits(found[-1:], False, fresh=False)
        return found

    def metadata(self) -> dict[str, str]:
        """The file's keys as llama.cpp reads them."""
        found = {}
        for i in range(self.lib.llama_model_meta_count(self.model)):
            texts = []
            for read in (self.lib.llama_model_meta_key_by_index, self.lib.llama_model_meta_val_str_by_index):
                size = read(self.model, i, ctypes.create_string_buffer(1), 1) + 1
                buffer = ctypes.create_string_buffer(max(1, size))
                read(self.model, i, buffer, size)
                texts.append(buffer.value.decode(errors="replace"))
            found[texts[0]] = texts[1]
        return found


def render(metadata: dict[str, str], tokens: dict[str, str], conversations: list) -> list[str]:
    """The conversations in the file's chat template, as llama-cpp-python renders it; an error's text begins with
    "error: "."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # pyright: ignore[reportMissingImports]

    found = []
    try:
        template = metadata["tokenizer.chat_template"]
        form = Jinja2ChatFormatter(template, eos_token=tokens["eos"], bos_token=tokens["bos"])
    except Exception as e:
        return [f"error: {type(e).__name__}: {e}"] * len(conversations)
    for messages in conversations:
        try:
            found.append(form(messages=messages).prompt)
        except Exception as e:
            found.append(f"error: {type(e).__name__}: {e}")
    return found


def quantize(job: dict[str, Any]) -> None:
    """The file job["from"] in another type, as job["to"]."""
    import llama_cpp as lib  # pyright: ignore[reportMissingImports]

    log = lib.llama_log_callback(_log)
    lib.llama_log_set(log, ctypes.c_void_p(0))
    settings: Any = lib.llama_model_quantize_default_params()
    settings.ftype = job["ftype"]
    given: Any = ctypes.byref(settings)
    if (code := lib.llama_model_quantize(job["from"].encode(), job["to"].encode(), given)) != 0:
        raise RuntimeError(f"error: llama_model_quantize gave {code}")


def answer(folder: Path) -> None:
    """Do what job.json asks."""
    job = json.loads((folder / "job.json").read_text())
    if "quantize" in job:
        return quantize(job["quantize"])
    llama = LlamaCpp(job["gguf"], job["positions"], job["threads"], job["watched"])
    metadata = llama.metadata()
    piece = lambda key: (
        llama.lib.llama_vocab_get_text(llama.vocab, int(metadata[key])).decode() if key in metadata else ""
    )
    tokens = {n: piece(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos")}
    found = {
        "ids": [[llama.encode(t, special) for special in (True, False)] for t in job["texts"]],
        "rendered": render(metadata, tokens, job["conversations"]) if job["conversations"] else [],
    }
    logits = []
    for i, row in enumerate(job["rows"]):
        logits.append(llama.logits(row))
        if i == 0:
            for name, values in llama.seen.items():
                np.save(folder / f"stage-{name}.npy", values.reshape(len(row), -1))
    np.save(folder / "logits.npy", np.concatenate(logits) if logits else np.zeros((0, llama.size), np.float32))
    found["greedy"] = [llama.greedy(p, job["new_tokens"], job["stops"]) for p in job["prompts"]]
    (folder / "answer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        answer(Path(sys.argv[1]))
    except RuntimeError as e:  # llama.cpp's reason has been printed
        sys.exit(str(e))
