"""The frozen executor on a server: the same as in process where the server works, nothing invented where it does not.

    python -m pytest tests/test_server.py

The server of these tests answers as vLLM 0.32 does (tried against it), with a tiny model behind it.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import data
import executor
import tracelift
import verify
from data import UserError
from executor import Executor, ServedExecutor, ServerError
from tracelift import EvalSettings, InspectSettings, IntSettings, SelectSettings, TrainSettings, train

NAME, SECRET = "base", "sk-4/7\\'secret"


class Answering(BaseHTTPRequestHandler):
    """One request to a Stub."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({"object": "list", "data": self.server.models}, path="/v1/models")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        with stub.lock:
            number = len(stub.bodies)
            stub.bodies.append(body)
            stub.keys.append(self.headers["Authorization"])
            stub.now += 1
            stub.most = max(stub.most, stub.now)
        time.sleep(stub.seconds)
        answer = stub.answer(body)
        trouble = stub.trouble(number, body) if isinstance(body["prompt"], list) else None
        with stub.lock:
            stub.now -= 1
        if trouble:
            trouble(self, answer)
        else:
            self.send(answer, 200 if "choices" in answer else 400)

    def send(self, answer, status=200, path="/v1/completions", **headers):
        if self.path != path:
            answer, status = {"detail": "Not Found"}, 404
        self.send_bytes(json.dumps(answer).encode(), status, **headers)

    def send_bytes(self, content, status=200, kind="application/json", length=None, **headers):
        head = [f"HTTP/1.1 {status} {self.responses[status][0]}", f"Content-Type: {kind}",
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
        self.models = [{"id": "another"}, {"id": NAME, "max_model_len": 512}]
        self.seconds, self.takes_n, self.reads_text = 0.0, True, True
        self.forget()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def forget(self):
        self.bodies, self.keys, self.now, self.most = [], [], 0, 0
        self.trouble = lambda number, body: None

    def handle_error(self, *_):                              # a client that has hung up
        pass

    def answer(self, body):
        prompt, n, new = body["prompt"], body["n"], body["max_tokens"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        if n > 1 and (body["temperature"] == 0 or not self.takes_n):
            return {"error": {"message": f"n must be 1 when using greedy sampling, got {n}."}}
        draws = executor.draws([f"{body['seed'] + k}" for k in range(n)], new)
        with self.computing:
            tokens = executor.generate(self.model, [prompt], num_samples=n, max_new_tokens=new, draws=draws,
                                       temperature=body["temperature"], eos_id=body["stop_token_ids"]).tokens
        ends = [row[-1] in body["stop_token_ids"] for row in tokens]
        texts = executor.decode_text(self.tokenizer, tokens)
        choices = [{"index": k, "text": text, "finish_reason": "stop" if end else "length"}
                   for k, (text, end) in enumerate(zip(texts, ends))]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sum(map(len, tokens))}
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1], "usage": usage}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(run folder up to the base model, that model with preferences, its tokenizer). At the usual initialisation its
    logits are nearly flat."""
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    data.main(["--run_dir", str(run_dir), "--train", "12", "--heldout", "3"])
    executor.main(["--run_dir", str(run_dir), "--device", "cpu", "--sequences", "16", "--hidden", "32", "--layers", "2",
                   "--warmup", "1", "--eval_problems", "2", "--max_answer_tokens", "6"])
    model, tokenizer = executor.load(str(run_dir / "base"), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    model.save_pretrained(run_dir / "base")
    return run_dir, model, tokenizer


@pytest.fixture
def run_dir(prepared, tmp_path):
    return Path(shutil.copytree(prepared[0], tmp_path / "toy"))


@pytest.fixture
def problems(prepared):
    return data.read_problems(prepared[0] / "groups" / "train.jsonl")


@pytest.fixture
def stub(prepared):
    server = Stub(*prepared[1:])
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of nearly nothing; a third of all outputs passes, for near-random models never succeed; no proxy."""
    monkeypatch.setattr(executor, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(verify, "extract_answer", lambda output: output)
    monkeypatch.setattr(verify, "math_equal", lambda output, reference: zlib.crc32(output.encode()) % 3 == 0)
    monkeypatch.delenv(executor.KEY, raising=False)


def served(stub, prepared, **options):
    return ServedExecutor(stub.url, NAME, str(prepared[0] / "base"), prepared[2], **{"max_new_tokens": 6, **options})


def settings(run_dir, stub, **changes):
    small = dict(run_dir=str(run_dir), device="cpu", mode="uplift_only", steps=3, warmup=1, problems_per_step=2,
                 group_size=3, repeats=2, learning_rate=5e-3, max_trace_tokens=8, max_answer_tokens=6, save_every=1,
                 executor=stub.url, executor_model=NAME)
    return TrainSettings(**small | changes)


def lines(folder, name="metrics.jsonl"):
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def assert_equal_runs(got, want):
    """Weights, metrics, samples: bit for bit."""
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (got, want))
    assert all(torch.equal(one["planner"][name], other["planner"][name]) for name in one["planner"])
    assert one["executor"] == other["executor"] and one["executor"]["baseline"]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(got, name) == lines(want, name) != []


# ---------------------------------------------------------------- the same as in process

def test_greedy_outputs_are_those_in_process(stub, prepared, problems):
    """Texts, verdicts, baselines and costs; the requests hold the ids that the executor in process reads."""
    own = Executor(prepared[1], prepared[2], max_new_tokens=6, temperature=0, seed=5)
    other = served(stub, prepared, temperature=0, seed=5)
    stub.forget()
    traces = [p.reference_reasoning for p in problems]
    want, got = (each.run_with_baseline(problems, traces, 2) for each in (own, other))
    assert got == want and len({run.output for runs in got[0] for run in runs}) > 5
    assert {run.ok for runs in got[0] for run in runs} == {True, False} and set(got[1]) == {0, 2}
    assert other.state() == own.state() and other.spent["executor_tokens"] > 60
    sent = {tuple(body["prompt"]) for body in stub.bodies}
    texts = [data.executor_prompt(p, t) for p, t in zip(problems * 2, traces + [None] * 12)]
    assert sent == {tuple(data.encode_prompt(prepared[2], text)) for text in texts}
    assert len(stub.bodies) == 12 * 3 + 12 * 2 and {body["n"] for body in stub.bodies} == {1}, "greedy: one by one"
    assert other.baseline(problems, 2) == got[1] and len(stub.bodies) == 60, "the baseline is known"
    assert other.run([], [], 3) == []


def test_sampled_outputs_are_a_function_of_the_runs_names(stub, prepared, problems):
    """Whatever stands beside them in the batch, and whether several are asked for at once or one by one."""
    def texts(frozen, some, when="0"):
        return [[run.output for run in runs] for runs in frozen.run(some, ["a"] * len(some), 3, when)]

    many = served(stub, prepared, seed=1)
    wanted = texts(many, problems[:4])
    assert {body["n"] for body in stub.bodies[3:]} == {3} and many.several
    assert len({text for row in wanted for text in row}) > 6, "the runs of a prompt have draws of their own"
    assert texts(many, problems[2:3]) == wanted[2:3] and texts(many, problems[:4]) == wanted
    assert texts(many, problems[:4], "1") != wanted and texts(served(stub, prepared, seed=2), problems[:4]) != wanted
    same_twice = many.run([problems[0]] * 2, ["a", "a"], 3, "0")
    assert [r.output for r in same_twice[0]] == wanted[0] != [r.output for r in same_twice[1]]
    stub.takes_n = False
    one_by_one = served(stub, prepared, seed=1)
    stub.forget()
    assert texts(one_by_one, problems[:4]) == wanted
    assert not one_by_one.several and len(stub.bodies) == 12


def test_everything_that_shapes_the_distribution_is_named(stub, prepared, problems):
    """Servers take what is left out from generation_config.json."""
    served(stub, prepared, temperature=0.6).run(problems[:1], None, 2)
    body = stub.bodies[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (
        0.6, 1, -1, 0, 1)
    assert body["stop_token_ids"] == [1] and body["skip_special_tokens"] and body["max_tokens"] == 6


def test_many_requests_are_in_flight(stub, prepared, problems):
    frozen = served(stub, prepared)
    stub.forget()
    stub.seconds, stub.answer = 0.2, answer_alike(stub)
    frozen.run(problems * 8, ["a"] * 96, 1)
    assert 16 < stub.most <= executor.IN_FLIGHT == 64


def answer_alike(stub):
    """A model's answer costs more than a request; this is the first one again and again."""
    real, known = stub.answer, []

    def answer(body):
        if not known:
            known.append(real(body))
        usage = {**known[0]["usage"], "prompt_tokens": len(body["prompt"])}
        return {**known[0], "usage": usage}
    return answer


# ---------------------------------------------------------------- a server in trouble

def forever(do, since=0):
    return lambda number, body: do if number >= since else None


def text_of(handler, answer, text):
    handler.send({**answer, "choices": [{**choice, "text": text} for choice in answer["choices"]]})


def silent(handler, answer):
    handler.close_connection = True
    time.sleep(1)


def dripping(handler, answer):
    content = json.dumps(answer).encode()
    with contextlib.suppress(OSError):
        for i in range(60):
            handler.send_bytes(content[:1], length=len(content)) if i == 0 else handler.wfile.write(content[i:i + 1])
            time.sleep(0.02)


def drop(handler, answer):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def drop_in_the_middle(handler, answer):
    content = json.dumps(answer).encode()
    handler.send_bytes(content[:len(content) // 2], length=len(content))


def changed(**changes):
    return lambda handler, answer: handler.send({**answer, **changes})


def choice_with(**changes):
    def do(handler, answer):
        first, *others = answer["choices"]
        handler.send({**answer, "choices": [{**first, **changes}, *others]})
    return do


PASSING = {                                                        # what is tried again, and what is said in the end
    "silent": (silent, "no answer in 0."),
    "slow": (dripping, "no answer in 0."),
    "truncated JSON": (lambda h, a: h.send_bytes(json.dumps(a).encode()[:-9]), "no JSON, or cut off"),
    "HTML": (lambda h, a: h.send_bytes(b"<html>ready</html>", kind="text/html"), "(text/html) is no JSON"),
    "500": (lambda h, a: h.send({"error": {"message": "engine\ndied"}}, 500), "500 Internal Server Error (engine died)"),
    "502 of a proxy": (lambda h, a: h.send_bytes(b"<html>", 502, "text/html"), "502 Bad Gateway, tries: 3"),
    "429": (lambda h, a: h.send({"message": "slowly"}, 429, Retry_After=0), "429 Too Many Requests (slowly), tries: 3"),
    "dropped": (drop, "no answer ("),
    "dropped in the middle": (drop_in_the_middle, "no JSON, or cut off")}
WRONG = {                                                          # what is an error at once
    "too few outputs": (lambda h, a: h.send({**a, "choices": a["choices"][1:]}), "outputs, asked for"),
    "too many outputs": (lambda h, a: h.send({**a, "choices": a["choices"] * 2}), "outputs, asked for"),
    "one output twice": (choice_with(index=0), "numbers"),
    "no outputs": (changed(choices=None), "no outputs"),
    "10 MB": (lambda h, a: text_of(h, a, "x" * 10_000_000), "longer than"),
    "another model": (changed(model="another"), "for the model 'another'"),
    "no text": (choice_with(text=None), "no text but NoneType"),
    "aborted": (choice_with(finish_reason="abort"), "for the reason 'abort'"),
    "without a reason": (choice_with(finish_reason=None), "for the reason None"),
    "cut early": (changed(usage={"prompt_tokens": 5, "completion_tokens": 1}), "counts 1 tokens"),
    "no usage": (changed(usage=None), "counts -1 tokens"),
    "a list": (lambda h, a: h.send([a]), "no JSON object"),
    "400": (lambda h, a: h.send({"error": {"message": "too long"}}, 400), "400 Bad Request (too long)"),
    "redirected": (lambda h, a: h.send({}, 307, Location="/v2"), "307 Temporary Redirect")}


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """A training that nothing disturbed."""
    folder, server = tmp_path_factory.mktemp("straight"), Stub(*prepared[1:])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(verify, "extract_answer", lambda output: output)
        m.setattr(verify, "math_equal", lambda output, reference: zlib.crc32(output.encode()) % 3 == 0)
        out = train(settings(shutil.copytree(prepared[0], folder / "toy"), server))
    server.shutdown()
    server.server_close()
    assert len({line["reward"] for line in lines(out)}) > 1 and any(line["grad_norm"] for line in lines(out))
    return out, len(server.bodies)


@pytest.mark.parametrize("kind", [*PASSING, *WRONG])
def test_what_a_server_does_wrong_is_an_error_and_no_output(stub, prepared, problems, monkeypatch, kind):
    do, reason = (PASSING | WRONG)[kind]
    frozen = served(stub, prepared)
    stub.forget()
    if kind in ("silent", "slow"):
        monkeypatch.setattr(executor, "TIME_LIMIT", 0.1)
    stub.trouble = forever(do, since=2)
    with pytest.raises(ServerError) as caught:
        frozen.run(problems[:5], None, 2)
    assert reason in str(caught.value) and str(caught.value).startswith(f"the executor's server {stub.url}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert frozen.state() == {"baseline": {}, "spent": dict.fromkeys(frozen.spent, 0)}
    tries = max(stub.bodies.count(body) for body in stub.bodies)
    assert tries in ([1] if kind in WRONG else [1, 2] if kind in ("silent", "slow") else [3]), "at most twice the limit"
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in ("dropped in the middle", "no text")
                                               else pytest.mark.slow) for kind in [*PASSING, *WRONG]])
def test_a_server_that_fails_stops_the_training_with_everything_saved(run_dir, stub, straight, monkeypatch, kind):
    """From the middle of the second step on. No reward is invented, nothing written is lost, and once the server works
    again the same command ends like a training that nothing disturbed."""
    do, reason = (PASSING | WRONG)[kind]
    stub.trouble = forever(do, since=3 + 8 + 3)                    # of the start 3, of the first step 6 + 2
    with monkeypatch.context() as m, pytest.raises(ServerError) as caught:
        if kind in ("silent", "slow"):
            m.setattr(executor, "TIME_LIMIT", 0.5)
        train(settings(run_dir, stub))
    assert reason in str(caught.value) and "checkpoint.pt holds the last saved step" in str(caught.value)
    work = run_dir / "planner-uplift_only-seed0.partial"
    assert lines(work) == lines(straight[0])[:1]
    assert lines(work, "samples.jsonl") == lines(straight[0], "samples.jsonl")[:3]
    stub.forget()
    assert_equal_runs(train(settings(run_dir, stub)), straight[0])


def test_trouble_that_passes_changes_nothing(run_dir, stub, straight, monkeypatch, capfd):
    """Every third request fails, in all ways; what is tried again is the same request."""
    monkeypatch.setattr(executor, "PAUSES", (0.01,) * 9)
    kinds = [do for kind, (do, _) in PASSING.items() if kind not in ("silent", "slow")]
    stub.trouble = lambda number, body: kinds[number // 3 % len(kinds)] if number > 2 and number % 3 == 0 else None
    out = train(settings(run_dir, stub))
    assert_equal_runs(out, straight[0])
    assert straight[1] < len(stub.bodies) < 2 * straight[1]
    asked = [json.dumps(body, sort_keys=True) for body in stub.bodies[3:]]
    assert len(set(asked)) == straight[1] - 3
    said = [line for line in capfd.readouterr().err.splitlines() if "tries again" in line]
    assert 1 <= len(said) <= 3, "once a step"


class Clock:
    """In place of the event that pauses wait for."""
    def __init__(self):
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)

    def is_set(self):
        return False

    def clear(self):
        pass


@pytest.mark.parametrize("said, waits", [("7", [7, 7]), ("0", [1, 4]), ("2", [2, 4]), ("soon", [1, 4]), ("1201", []),
                                         (None, [1, 4])])
def test_pauses_grow_and_retry_after_is_honoured(stub, prepared, monkeypatch, said, waits):
    """One that is longer than twice the time limit is not waited for."""
    monkeypatch.setattr(executor, "PAUSES", (1, 4))
    frozen = served(stub, prepared)
    frozen.server._stopped = clock = Clock()
    headers = {"Retry_After": said} if said else {}
    stub.trouble = forever(lambda h, a: h.send({}, 429, **headers))
    with pytest.raises(ServerError, match="429 Too Many Requests, tries: "):
        frozen._ask(frozen._body([5, 6], 1, 0))
    assert clock.waited == waits


def hold(handler, answer):
    handler.close_connection = True
    time.sleep(60)


def test_the_first_error_ends_the_requests_that_wait(stub, prepared, problems):
    """A training that stops must not hang for as long as the slowest request may take."""
    frozen = served(stub, prepared)
    stub.trouble = lambda number, body: hold if number < 8 else WRONG["another model"][0]
    begin = time.monotonic()
    with pytest.raises(ServerError, match="another"):
        frozen.run(problems[:6], ["a"] * 6, 1)
    assert time.monotonic() - begin < 20
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    stub.forget()
    assert len(frozen.run(problems[:6], ["a"] * 6, 1)) == 6, "and it can be used again"


def test_ctrl_c_ends_the_requests_that_wait(stub, prepared, problems):
    frozen = served(stub, prepared)
    stub.trouble = forever(hold)
    begin = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        frozen.run(problems[:6], ["a"] * 6, 1)
    assert time.monotonic() - begin < 20


def test_an_empty_output_is_the_models(stub, prepared, problems):
    """Its end at once is a failed attempt; without even that, nothing has run."""
    frozen = served(stub, prepared)
    ended = {"finish_reason": "stop", "text": ""}
    stub.trouble = forever(lambda h, a: h.send({**a, "choices": [{**a["choices"][0], **ended}]}))
    stub.answer = lambda body: {"model": NAME, "choices": [{"index": 0}],
                                "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}}
    assert frozen.run(problems[:1], ["a"], 1)[0][0].output == ""
    stub.answer = lambda body: {"model": NAME, "choices": [{"index": 0}],
                                "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0}}
    with pytest.raises(ServerError, match="counts 0 tokens in 1 outputs"):
        frozen.run(problems[:1], ["a"], 1)


# ---------------------------------------------------------------- what is refused at the start

@pytest.mark.parametrize("url", ["http://me:hunter2@host:8000/v1", "http://host:8000/v1?key=hunter2", "http://host/v1#x",
                                 "host:8000/v1", "ftp://host/v1", "http://host:99999/v1", "http://host:0", "http://",
                                 "http://ho st/v1", "http://host:8000/v1\n", "file:///v1"])
def test_a_url_that_cannot_be_used_is_one_line(run_dir, capsys, url):
    """Before anything is written, and without what may be a password."""
    with pytest.raises(SystemExit) as stop:
        data.run_command(tracelift.main, ["train", "--run_dir", str(run_dir), "--executor", url, "--executor_model", "m"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: --executor") and said.count("\n") == 1
    assert "http://HOST:PORT/v1" in said and "hunter2" not in said
    assert sorted(p.name for p in run_dir.iterdir()) == ["base", "groups"]


@pytest.mark.parametrize("url, parts", [("http://h:8000/v1", ("http", "h", 8000, "/v1")),
                                        ("https://a.b-c.d/x/v1/", ("https", "a.b-c.d", 443, "/x/v1")),
                                        ("http://[::1]:30000", ("http", "[::1]", 30000, ""))])
def test_a_url_in_parts(url, parts):
    assert executor.split_url(url) == parts


@pytest.mark.parametrize("changes", [{"executor": ""}, {"executor_model": ""}])
def test_one_flag_without_the_other_is_refused(run_dir, stub, changes):
    for call, cls in ((train, TrainSettings), (tracelift.intervene, IntSettings), (tracelift.select, SelectSettings)):
        flags = {"executor": stub.url, "executor_model": NAME, **changes}
        with pytest.raises(UserError, match="--executor and --executor_model go together"):
            call(cls(run_dir=str(run_dir), device="cpu", **flags))


def reads(count):
    return lambda h, a: h.send({**a, "usage": {**a["usage"], "prompt_tokens": count}})


@pytest.mark.parametrize("trouble, reason", [
    (lambda h, a: h.send({"error": {"message": "prompt must be a string"}}, 400), "400 Bad Request (prompt must be a"),
    (lambda h, a: h.send({"detail": [{"msg": "not a string"}]}, 422), "422 Unprocessable"),
    (reads(200), "has read 200 tokens where"),
    (reads(None), "has read -1 tokens where")])
def test_a_server_that_takes_no_ids_is_refused_with_the_reason(stub, prepared, trouble, reason):
    stub.trouble = forever(trouble)
    with pytest.raises(UserError) as caught:
        served(stub, prepared)
    assert reason in str(caught.value) and "as text, a trace that spells control tokens" in str(caught.value)


def test_another_tokenizer_or_none_is_refused(stub, prepared):
    real = stub.tokenizer
    stub.tokenizer = lambda text: {"input_ids": list(range(3, 9))}
    stub.tokenizer.batch_decode = real.batch_decode
    with pytest.raises(UserError, match="cuts a text into 6 tokens, the run's base model into"):
        served(stub, prepared)
    stub.tokenizer = real
    stub.trouble = forever(lambda h, a: text_of(h, {**a, "usage": {**a["usage"], "completion_tokens": 8}, "choices": [
        {"index": 0, "finish_reason": "length"}]}, ""))
    with pytest.raises(UserError, match="counts 8 tokens and returns no text"):
        served(stub, prepared)


@pytest.mark.parametrize("models, reason", [
    ([{"id": "a"}, {"id": "b"}], "serves a, b"), ([], "serves no model"), (None, "serves no model"),
    (["a", {"max_model_len": 3}], "serves None")])
def test_a_model_that_is_not_there_is_one_line(stub, prepared, models, reason):
    stub.models = models
    with pytest.raises(UserError, match=f"--executor_model {NAME}: {stub.url} {reason}"):
        served(stub, prepared)


def test_a_server_that_is_not_there_is_one_line(run_dir, stub, capsys):
    stub.shutdown()
    stub.server_close()
    begin = time.monotonic()
    with pytest.raises(SystemExit):
        data.run_command(tracelift.main, ["train", "--run_dir", str(run_dir), "--mode", "exec_only", "--device", "cpu",
                                          "--executor", stub.url, "--executor_model", NAME])
    said = capsys.readouterr().err
    assert said.startswith(f"error: the executor's server {stub.url}: no answer (ConnectionRefusedError")
    assert said.count("\n") == 1 and "--run_dir" not in said, "no path is to blame"
    assert sorted(p.name for p in run_dir.iterdir()) == ["base", "groups"]
    assert time.monotonic() - begin < 20, "nothing is tried again at the start"


def test_a_url_without_its_path_is_told(stub, prepared):
    stub.url = stub.url.removesuffix("/v1")
    with pytest.raises(ServerError, match="/models answers 404 Not Found .*ends in /v1"):
        served(stub, prepared)


@pytest.mark.parametrize("limit, refused", [(40, True), (None, False)])
def test_lengths_are_those_of_the_server(run_dir, stub, limit, refused):
    """It may keep to a shorter context than the model knows."""
    stub.models = [{"id": NAME, "max_model_len": limit}]
    if not refused:
        train(settings(run_dir, stub, steps=1))
        return
    with pytest.raises(UserError, match=r"the context of the model that reads it is 40; lower --max_trace_tokens or --max_a"):
        train(settings(run_dir, stub))
    assert all(body["max_tokens"] in (1, 8) for body in stub.bodies), "nothing was sampled"
    frozen = ServedExecutor(stub.url, NAME, str(run_dir / "base"), stub.tokenizer, max_new_tokens=6)
    with pytest.raises(UserError, match="the executor: a prompt of .* exceed the model's context of 40"):
        frozen.run(data.read_problems(run_dir / "groups" / "train.jsonl"), ["1 + 2 = 3 ; " * 4] * 12, 1)


# ---------------------------------------------------------------- keys

def test_the_key_reaches_the_server_and_nothing_else(run_dir, stub, monkeypatch, capfd):
    """Not even where the server repeats it."""
    monkeypatch.setenv(executor.KEY, SECRET)
    stub.models.append({"id": SECRET})
    stub.trouble = lambda number, body: None if number < 12 else lambda h, a: h.send(
        {"error": {"message": f"key {SECRET} is out of {SECRET}"}}, 500, X_Key=SECRET)
    with pytest.raises(SystemExit):
        data.run_command(train, settings(run_dir, stub))
    assert set(stub.keys) == {f"Bearer {SECRET}"}
    out, err = capfd.readouterr()
    assert "500 Internal Server Error (key (key) is out of (key))" in err and SECRET not in out + err
    files = [p for p in run_dir.rglob("*") if p.is_file()]
    assert {"settings.json", "metrics.jsonl", "checkpoint.pt"} <= {p.name for p in files}
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    for do in (changed(model=SECRET), choice_with(finish_reason=SECRET), choice_with(index=SECRET),
               lambda h, a: h.send({"detail": SECRET}, 401), lambda h, a: h.send({"detail": "x" * 320 + SECRET}, 401)):
        stub.trouble = forever(do)
        with pytest.raises(ServerError) as caught:
            ServedExecutor(stub.url, NAME, str(run_dir / "base"), stub.tokenizer, max_new_tokens=6)
        assert re.search(r"\(key\)|x\W*$", str(caught.value)) and SECRET[:5] not in str(caught.value)
    with pytest.raises(UserError, match=r"serves another, base, \(key\)") as caught:
        ServedExecutor(stub.url, "nobody", str(run_dir / "base"), stub.tokenizer, max_new_tokens=6)


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel"])
def test_a_key_that_no_header_takes_is_not_shown(stub, prepared, monkeypatch, key):
    monkeypatch.setenv(executor.KEY, key)
    with pytest.raises(UserError, match=f"{executor.KEY}: must be letters") as caught:
        served(stub, prepared)
    assert key not in str(caught.value)


def test_without_a_key_none_is_sent(stub, prepared):
    served(stub, prepared)
    assert set(stub.keys) == {None} and len(stub.keys) == 3


# ---------------------------------------------------------------- the commands

def test_the_commands_use_the_server(run_dir, stub, monkeypatch):
    """The executor is not loaded for it, and what was trained against a server is measured against it."""
    loaded = []
    real = executor.load
    monkeypatch.setattr(executor, "load", lambda *args: loaded.append(args[0]) or real(*args))
    out = train(settings(run_dir, stub, steps=1))
    assert [Path(name).name for name in loaded] == ["base"], "the planner"
    made = data.read_settings(out)
    assert (made["executor"], made["executor_model"]) == (stub.url, NAME)
    stub.forget()
    tracelift.evaluate(EvalSettings(run_dir=str(run_dir), device="cpu", problems=3))
    assert len(stub.bodies) == 2 * 3 + 2 * 3 * (1 + 1 + 2 + 2), "twice the start; of 2 splits no trace, references, two planners"
    stub.forget()
    tracelift.evaluate(EvalSettings(run_dir=str(run_dir), device="cpu", problems=3, executor="http://127.0.0.1:9/v1"))
    assert not stub.bodies, "the place of a server changes no result"
    with pytest.raises(ServerError, match="127.0.0.1:9/v1: no answer"):
        tracelift.evaluate(EvalSettings(run_dir=str(run_dir), device="cpu", problems=2, executor="http://127.0.0.1:9/v1"))
    said = tracelift.inspect(InspectSettings(run_dir=str(run_dir), device="cpu", planner=out.name, traces=2))
    assert "[Executor.run, verify]" in said and len(stub.bodies) > 3
    with pytest.raises(UserError, match="made with --executor_model 'base', now it is 'other'"):
        train(settings(run_dir, stub, steps=1, executor_model="other"))
    assert train(settings(run_dir, stub, steps=1, executor="http://127.0.0.1:9/v1")) == out
    assert lines(train(settings(run_dir, stub, steps=1, lora_rank=2, name="adapter"))) != []


def test_a_server_that_nothing_here_was_trained_with_has_no_effect(run_dir):
    for call, cls in ((tracelift.evaluate, EvalSettings), (tracelift.inspect, InspectSettings)):
        with pytest.raises(UserError, match="--executor has no effect"):
            call(cls(run_dir=str(run_dir), device="cpu", executor="http://127.0.0.1:9/v1"))
        with pytest.raises(UserError, match="--executor '9': must be http://HOST:PORT/v1"):
            call(cls(run_dir=str(run_dir), device="cpu", executor="9"))


def test_interventions_are_tried_on_the_server(run_dir, stub):
    """InT's planner continues in process, its executor runs on the server."""
    tracelift.intervene(IntSettings(run_dir=str(run_dir), device="cpu", problems=2, group_size=2, proposals=2, repeats=1,
                                    epochs=1, max_trace_tokens=8, max_answer_tokens=6, executor=stub.url,
                                    executor_model=NAME))
    assert len(stub.bodies) >= 3 + 4
    assert data.read_settings(run_dir / "int")["executor_model"] == NAME


def test_problems_are_selected_on_the_server(run_dir, stub):
    tracelift.select(SelectSettings(run_dir=str(run_dir), device="cpu", problems=3, group_size=2, max_trace_tokens=8,
                                    max_answer_tokens=6, lowest=0.0, highest=1.0, executor=stub.url, executor_model=NAME))
    assert len(stub.bodies) == 3 + 6
