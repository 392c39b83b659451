"""Completions per second of an executor on a server that takes a fixed time for a request and any number at once.

    python tests/tools/bench_server.py                    # with 1, 4, 16 and 64 requests in flight

The server knows no model and runs in a process of its own, on the same cores. Where the share of the ideal falls, one of
the two is the limit; the client's own processor time tells how many requests it could make in a second.
"""
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
import executor  # noqa: E402
from data import option  # noqa: E402


@dataclass(frozen=True)
class BenchSettings(data.Options):
    """Settings of this command."""
    milliseconds: float = option(50.0, "that the server takes for a request", above=0)
    prompt: int = option(200, "tokens of a prompt", low=1)
    seconds: float = option(1.0, "of a row, ideally", above=0)
    rounds: int = option(3, "of all rows in turn", low=1)


def serve(port, seconds: float) -> None:
    """The server; puts its port into the queue `port`."""
    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(length))
        await asyncio.sleep(seconds)
        choices = [{"index": 0, "text": "5 + 7 = 12 ; " * 16, "finish_reason": "length"}]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        content = json.dumps({"model": body["model"], "choices": choices, "usage": usage}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    async def forever():
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()
    asyncio.run(forever())


class Bare(executor.ServedExecutor):
    """Without tokenizer, model and the questions at the start."""

    def __init__(self, url: str):
        executor.Executor.__init__(self, None, None, max_new_tokens=64)
        self.url, self.name = url, "stub"


def measure(frozen: Bare, in_flight: int, s: BenchSettings) -> tuple[float, float]:
    """Completions per second, and this process's milliseconds for a request."""
    executor.IN_FLIGHT = in_flight
    requests = max(1, round(in_flight * s.seconds * 1000 / s.milliseconds))
    prompts, keys = [list(range(s.prompt))] * requests, [str(i) for i in range(requests)]
    begin, spent = time.perf_counter(), time.process_time()
    frozen._write(prompts, [1] * requests, keys)
    return requests / (time.perf_counter() - begin), 1000 * (time.process_time() - spent) / requests


def main(argv) -> None:
    """The command."""
    s = data.parse_settings(BenchSettings, argv, "bench_server.py")
    executor.eos_ids = lambda model, tokenizer: [1]
    port = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port, s.milliseconds / 1000), daemon=True)
    server.start()
    frozen, found = Bare(f"http://127.0.0.1:{port.get(timeout=60)}"), {}
    for _ in range(s.rounds):
        for in_flight in (1, 4, 16, 64):
            found.setdefault(in_flight, []).append(measure(frozen, in_flight, s))
    server.kill()
    for in_flight, rows in found.items():
        rates, spent = zip(*rows)
        ideal, middle = in_flight * 1000 / s.milliseconds, statistics.median(rates)
        print(f"{in_flight:3} in flight: {middle:7,.0f} completions/s ({min(rates):,.0f} to {max(rates):,.0f}), "
              f"{middle / ideal:4.0%} of {ideal:,.0f}; the client's own time {statistics.median(spent):.2f} ms a request")


if __name__ == "__main__":
    data.run_command(main)
