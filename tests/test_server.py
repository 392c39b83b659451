"""The frozen executor on a server: the same as in process where the server works, nothing invented where it does not.

    python -m pytest tests/test_server.py

The server of these tests answers as vLLM and llama.cpp do, with a tiny model behind it.
"""
import json
import os
import signal
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import data
import executor
import verify
from data import UserError
from executor import Executor, ServedExecutor, ServerError

NAME, SECRET = "base", "sk-4/7\\'secret"


class Answering(BaseHTTPRequestHandler):
    """One request to a Stub."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        if self.path == "/v1/models":
            self.send({"object": "list", "data": self.server.models})
        else:
            self.send({"detail": "Not Found"}, 404)

    def do_POST(self):
        body, stub = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with stub.lock:
            number = len(stub.bodies)
            stub.bodies.append(body)
            stub.keys.append(self.headers["Authorization"])
            stub.now += 1
            stub.most = max(stub.most, stub.now)
        time.sleep(stub.seconds)
        answer, trouble = stub.answer(body), stub.trouble(number, body)
        with stub.lock:
            stub.now -= 1
        (trouble or Answering.send)(self, answer)

    def send(self, answer, status=200, **headers):
        self.send_bytes(json.dumps(answer).encode(), status, **headers)

    def send_bytes(self, content, status=200, length=None, **headers):
        head = [f"HTTP/1.1 {status} {self.responses[status][0]}", "Content-Type: application/json",
                f"Content-Length: {len(content) if length is None else length}", "Connection: close"]
        head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.wfile.write("\r\n".join(head + ["", ""]).encode() + content)
        self.close_connection = True

    def log_message(self, *_):
        pass


class Stub(ThreadingHTTPServer):
    """A server with a model. `trouble(number, body)` may return what to do with a request instead of answering it."""
    request_queue_size, daemon_threads, block_on_close = 256, True, False

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Answering)
        self.model, self.tokenizer, self.lock, self.computing = model, tokenizer, threading.Lock(), threading.Lock()
        self.models, self.seconds = [{"id": "another"}, {"id": NAME, "max_model_len": 512}], 0.0
        self.forget()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def forget(self):
        self.bodies, self.keys, self.now, self.most = [], [], 0, 0
        self.trouble = lambda number, body: None

    def handle_error(self, *_):                              # a client that has hung up
        pass

    def answer(self, body):
        numbers = executor.uniform_numbers([str(body["seed"])], body["max_tokens"])
        with self.computing:
            row, = executor.generate(self.model, [body["prompt"]], max_new_tokens=body["max_tokens"], uniforms=numbers,
                                     temperature=body["temperature"], eos_id=body["stop_token_ids"]).tokens
        reason = "stop" if row[-1] in body["stop_token_ids"] else "length"
        text, = executor.decode_text(self.tokenizer, [row])
        return {"model": body["model"], "choices": [{"index": 0, "text": text, "finish_reason": reason}],
                "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(row)}}


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """(folder, model, tokenizer). Wide weights, so that outputs differ."""
    model, tokenizer = executor.load(str(tiny[0]), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


@pytest.fixture(scope="module")
def problems():
    return data.tiny_problems("math", 12, 0)


@pytest.fixture
def stub(prepared):
    server = Stub(*prepared[1:])
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of nearly nothing. A third of all outputs passes, because near-random models never succeed."""
    monkeypatch.setattr(executor, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(verify, "extract_answer", lambda output: output)
    monkeypatch.setattr(verify, "math_equal", lambda output, reference: zlib.crc32(output.encode()) % 3 == 0)
    monkeypatch.delenv(executor.KEY, raising=False)


def served(stub, prepared, **options):
    frozen = ServedExecutor(stub.url, NAME, prepared[0], prepared[2], **{"max_new_tokens": 6, **options})
    stub.forget()
    return frozen


def forever(do, since=0):
    return lambda number, body: do if number >= since else None


# ---------------------------------------------------------------- the same as in process

def test_greedy_outputs_are_those_in_process(stub, prepared, problems):
    """Texts, verdicts, cuts, baselines and costs. One request per run, with the ids that the executor in process reads
    and all that shapes the distribution: servers take the rest from generation_config.json."""
    own = Executor(prepared[1], prepared[2], max_new_tokens=6, temperature=0, seed=5)
    other = served(stub, prepared, temperature=0, seed=5)
    traces = [p.reference_reasoning for p in problems]
    want, got = (each.run_with_baseline(problems, traces, 2) for each in (own, other))
    assert got == want and len({run.output for runs in got[0] for run in runs}) > 5
    assert {run.ok for runs in got[0] for run in runs} == {True, False} and set(got[1]) == {0, 2}
    assert other.baselines == own.baselines and other.spent == own.spent and other.spent["executor_tokens"] > 60
    texts = [data.executor_prompt(p, t) for p, t in zip(problems * 2, traces + [None] * 12)]
    assert {tuple(body["prompt"]) for body in stub.bodies} == {tuple(data.encode_prompt(prepared[2], text))
                                                               for text in texts}
    assert len(stub.bodies) == 12 * 3 + 12 * 2 and {body["n"] for body in stub.bodies} == {1}
    body = stub.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 1, -1,
                                                                                                              0, 1)
    assert body["stop_token_ids"] == [1] and body["skip_special_tokens"] and body["max_tokens"] == 6
    assert other.baseline(problems, 2) == got[1] and len(stub.bodies) == 60, "the baseline is known"
    assert other.run([], [], 3) == [] and set(stub.keys) == {None}


def test_sampled_outputs_are_a_function_of_the_runs_keys(stub, prepared, problems):
    """Whatever stands beside them in the batch."""
    def texts(frozen, some, key="0"):
        return [[run.output for run in runs] for runs in frozen.run(some, ["a"] * len(some), 3, key)]

    many = served(stub, prepared, seed=1)
    wanted = texts(many, problems[:4])
    assert len({text for row in wanted for text in row}) > 6, "the runs of a prompt have seeds of their own"
    assert texts(many, problems[2:3]) == wanted[2:3] and texts(many, problems[:4]) == wanted
    assert texts(many, problems[:4], "1") != wanted and texts(served(stub, prepared, seed=2), problems[:4]) != wanted


def test_many_requests_are_in_flight(stub, prepared, problems):
    frozen = served(stub, prepared)
    stub.seconds = 0.2
    stub.answer = lambda body: {"model": NAME, "choices": [{"text": "", "finish_reason": "stop"}],
                                "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}}
    runs = frozen.run(problems * 8, ["a"] * 96, 1)
    assert {run.output for row in runs for run in row} == {""}, "an end at once is the model's answer"
    assert 16 < stub.most <= executor.IN_FLIGHT == 64


# ---------------------------------------------------------------- a server in trouble

def drop(handler, answer):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def hold(handler, answer):
    handler.close_connection = True
    time.sleep(60)


def changed(**changes):
    return lambda handler, answer: handler.send({**answer, **changes})


def choice_with(**changes):
    return lambda handler, answer: handler.send({**answer, "choices": [{**answer["choices"][0], **changes}]})


def usage(read=0, wrote=0):
    return lambda handler, answer: handler.send({**answer, "usage": {
        "prompt_tokens": answer["usage"]["prompt_tokens"] + read, "completion_tokens": wrote}})


PASSING = {                                                        # what is tried again
    "silent": hold, "dropped": drop,
    "truncated JSON": lambda h, a: h.send_bytes(json.dumps(a).encode()[:-9]),
    "dropped in the middle": lambda h, a: h.send_bytes(json.dumps(a).encode()[:20], length=200),
    "HTML": lambda h, a: h.send_bytes(b"<html>ready</html>"),
    "500": lambda h, a: h.send({"error": {"message": "engine\ndied"}}, 500),
    "429": lambda h, a: h.send({"message": "slowly"}, 429, Retry_After=0)}
WRONG = {                                                          # what is an error at once
    "no outputs": changed(choices=[]), "null": changed(choices=None), "several": changed(choices=[{}, {}]),
    "another model": changed(model="another"), "no text": choice_with(text=None),
    "aborted": choice_with(finish_reason="abort"), "no usage": changed(usage=None), "none written": usage(wrote=0),
    "too many written": usage(wrote=7), "other tokens read": usage(read=1, wrote=3),
    "cut early": lambda h, a: usage(wrote=2)(h, {**a, "choices": [{**a["choices"][0], "finish_reason": "length"}]}),
    "a list": lambda h, a: h.send([a]), "400": lambda h, a: h.send({"error": {"message": "too long"}}, 400)}


@pytest.mark.parametrize("kind", [*PASSING, *WRONG])
def test_what_a_server_does_wrong_is_an_error_and_no_output(stub, prepared, problems, monkeypatch, kind):
    frozen = served(stub, prepared)
    if kind == "silent":
        monkeypatch.setattr(executor, "TIME_LIMIT", 0.1)
    stub.trouble = forever((PASSING | WRONG)[kind], since=2)
    with pytest.raises(ServerError) as caught:
        frozen.run(problems[:5], None, 2)
    assert str(caught.value).startswith(f"the executor's server {stub.url}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not frozen.baselines and not any(frozen.spent.values())
    tries = max(stub.bodies.count(body) for body in stub.bodies)
    assert tries == (1 if kind in WRONG else 3)


def test_trouble_that_passes_changes_nothing(stub, prepared, problems, monkeypatch):
    """Every third request fails, in all ways. What is tried again is the same request."""
    monkeypatch.setattr(executor, "PAUSES", (0.01,) * 9)
    wanted = served(stub, prepared).run(problems, None, 2)
    frozen, kinds = served(stub, prepared), [do for do in PASSING.values() if do is not hold]
    stub.trouble = lambda number, body: kinds[number // 3 % len(kinds)] if number % 3 == 0 else None
    assert frozen.run(problems, None, 2) == wanted
    assert 24 < len(stub.bodies) < 48 and len({json.dumps(body, sort_keys=True) for body in stub.bodies}) == 24


@pytest.mark.parametrize("said, waits", [("7", [7, 7]), ("2", [2, 4]), ("soon", [1, 4]), (None, [1, 4]),
                                         ("9999", [600, 600])])
def test_pauses_grow_and_retry_after_is_honoured(stub, prepared, monkeypatch, said, waits):
    monkeypatch.setattr(executor, "PAUSES", (1, 4))
    frozen, slept = served(stub, prepared), []
    monkeypatch.setattr(executor.time, "sleep", slept.append)
    headers = {"Retry_After": said} if said else {}
    stub.trouble = forever(lambda h, a: h.send({}, 429, **headers))
    with pytest.raises(ServerError, match="429 Too Many Requests"):
        frozen._ask([5, 6], 0)
    assert [seconds for seconds in slept if seconds] == waits      # 0: the stub's own


def test_the_first_error_ends_the_requests_that_wait(stub, prepared, problems):
    """A training that stops must not hang for as long as the slowest request may take. Nor after Ctrl-C."""
    frozen = served(stub, prepared)
    stub.trouble = lambda number, body: hold if number < 8 else WRONG["another model"]
    begin = time.monotonic()
    with pytest.raises(ServerError, match="another"):
        frozen.run(problems[:6], ["a"] * 6, 2)
    stub.forget()
    assert len(frozen.run(problems[:6], ["a"] * 6, 1)) == 6, "and it can be used again"
    stub.trouble = forever(hold)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        frozen.run(problems[:6], ["a"] * 6, 1)
    assert time.monotonic() - begin < 20


# ---------------------------------------------------------------- what is refused at the start

@pytest.mark.parametrize("url", ["http://me:hunter2@host:8000/v1", "http://host:8000/v1?key=hunter2",
                                 "http://host/v1#x", "host:8000/v1", "ftp://host/v1", "http://", "http://ho st/v1"])
def test_a_url_that_cannot_be_used_is_one_line(prepared, url):
    """Without what may be a password."""
    with pytest.raises(UserError, match="--executor: must be http://HOST:PORT/v1") as caught:
        ServedExecutor(url, NAME, prepared[0], prepared[2], max_new_tokens=6)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("models, trouble, said", [
    ([{"id": "a"}, {"id": "b"}], None, f"--executor_model {NAME}: http.* serves a, b"), (None, None, "no model"),
    ([{"id": NAME}], lambda h, a: h.send({"detail": "prompt must be a string"}, 422), "must be a string"),
    ([{"id": NAME}], usage(read=99, wrote=3), "it says")])
def test_a_server_that_cannot_serve_is_refused(stub, prepared, models, trouble, said):
    """Without the model, or not reading our ids."""
    stub.models, stub.trouble = models, forever(trouble)
    with pytest.raises((UserError, ServerError), match=said):
        served(stub, prepared)


def test_a_server_that_is_not_there_is_one_line(stub, prepared):
    """Nothing is tried again at the start."""
    stub.url = stub.url.removesuffix("/v1")
    with pytest.raises(ServerError, match="404 Not Found"):
        served(stub, prepared)
    stub.shutdown()
    stub.server_close()
    with pytest.raises(ServerError, match="Connection refused"):
        served(stub, prepared)


def test_the_context_is_that_of_the_server(stub, prepared, problems):
    """It may keep to a shorter one than the model knows."""
    stub.models = [{"id": NAME, "max_model_len": 100}]
    frozen = served(stub, prepared)
    assert frozen.context == 100
    assert frozen.run(problems[:1], ["1 + 2 = 3 ; " * 20], 1) == [[executor.NO_ROOM]] and not stub.bodies
    stub.models = [{"id": NAME}]
    assert served(stub, prepared).context == 512


# ---------------------------------------------------------------- keys

def test_the_key_is_in_the_header_and_nowhere_else(stub, prepared, problems, monkeypatch, capfd):
    """Not even where the server repeats it, in an error or in an output."""
    monkeypatch.setenv(executor.KEY, SECRET)
    stub.models.append({"id": SECRET})
    frozen = ServedExecutor(stub.url, NAME, prepared[0], prepared[2], max_new_tokens=6)
    assert set(stub.keys) == {f"Bearer {SECRET}"}
    stub.trouble = forever(choice_with(text=f"20 {SECRET}"))
    assert frozen.run(problems[:1], None, 1)[0][0].output == "20 (key)"
    said = []
    for do in (changed(model=SECRET), choice_with(finish_reason=SECRET), lambda h, a: h.send({"detail": SECRET}, 401),
               lambda h, a: h.send({"error": f"key {SECRET} is out of {SECRET}"}, 500, X_Key=SECRET)):
        stub.trouble = forever(do)
        with pytest.raises(ServerError) as caught:
            frozen.run(problems[:1], ["a"], 1)
        said.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        ServedExecutor(stub.url, "nobody", prepared[0], prepared[2], max_new_tokens=6)
    said += [str(caught.value), *capfd.readouterr()]
    assert all("(key)" in text for text in said[:5]) and SECRET[:5] not in "".join(said)


def test_a_key_that_no_header_takes_is_not_shown(stub, prepared, monkeypatch):
    monkeypatch.setenv(executor.KEY, "line\nend")
    with pytest.raises(ServerError) as caught:
        served(stub, prepared)
    assert "end" not in str(caught.value)
