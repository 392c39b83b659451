"""Did it come out right?  The verifier of TraceLift: final answers of word problems, and programs against tests.

    extract_answer, math_equal     the last marked answer of a text, compared as an exact rational
    extract_code                   the last fenced block of a completion
    run_programs, exec_score       programs run in throw-away processes -> Verdict -> reward

`python verify.py PROGRAM.py TESTS.json` prints one verdict.  Standard library only; running programs needs Linux.

The trainer may hold threads, CUDA and gigabytes, so it never forks itself.  Each call of run_programs starts a few
clean small interpreters (helpers), and a helper forks one child per run:

    trainer --- job: program, inputs ---> helper --- fork ---> child: limits, then the program as __main__
            <--- what it printed ------          <-- report -- killed with all its descendants when it ends

An expected output never leaves the trainer, so there is nothing to steal.  A verdict always speaks about the program:
when the machinery fails, SandboxError is raised, because a silent 0 would be a reward for something nobody did.

Threat model: programs written by a language model under reward pressure.
  Stopped: endless loops and sleeps, big allocations, floods of output, big files, processes left behind (also after
  setsid), secrets in the environment, files left in the working folder, results that depend on the hash seed, and
  faking a pass by ending early (exit, os._exit) or by patching exec, os.write and the like.
  NOT stopped yet (that takes seccomp, Landlock, namespaces): network, the user's other files, /proc/PID/environ of the
  trainer, signals to the trainer or the helper (a killed helper ends in SandboxError), fork bombs, memory and disk
  summed over processes and files.  Asserts are compared inside the child, so an object whose __eq__ always agrees
  passes, and code that walks the frames can find the report token.  Stdin tests have neither hole.  Do not run this
  as root, or near secrets.
"""
from __future__ import annotations

import atexit
import builtins
import gc
import inspect
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

# ---------------------------------------------------------------- answers

MAX_ANSWER = 4000  # characters of one answer; a longer one is no answer
MAX_DIGITS = 400   # of one number, and its largest exponent: bounds the big-integer arithmetic

_MARKER = re.compile(r"####\s*|\banswer\**\s*(?:is\b|:|=)[\s:*]*", re.IGNORECASE)
# [0-9] and not \d, which also matches the digits of every other script.
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])-)?{_DECIMAL}(?:\s*/\s*{_DECIMAL})?%?")  # 10-5 holds 10 and 5, not -5
_VALUE = re.compile(rf"(?:[A-Za-z]\w*\s*=)?\s*([-+]?)\s*({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?(?:\s*%)?(.*)", re.DOTALL)
_FRAC = re.compile(rf"\\[dt]?frac\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}}|([0-9])\s*([0-9]))")
# The words after a number are its unit ("24 coins left"), except those that make another number of it.
_NOT_UNITS = set("hundred thousand million billion trillion dozen half third quarter squared cubed factorial times plus"
                 " minus over or and to not pi sqrt".split())


def extract_answer(text: str) -> str | None:
    r"""The final answer of a solution, as written; None when there is none.

    The last marker wins: \boxed{x}, '#### x', 'answer is x', 'Answer: x' (to the end of the line or sentence).  Without
    one it is the last number of the last line that is not empty, so a bare ' 24' works.  Time is linear in the text.
    """
    marked = _marked(text)
    if marked is not None:
        return marked if len(marked) <= MAX_ANSWER else None
    numbers = _NUMBER.findall(_clean(text.rstrip()[-MAX_ANSWER:].rpartition("\n")[2]))
    return numbers[-1] if numbers else None


def math_equal(prediction: str | None, reference: str) -> bool:
    """Whether two final answers (or texts with a marked one) are the same number, or else the same text.

    Numbers are exact rationals, without tolerance; a unit is ignored, and percent is one (50% is 50, not 0.5).
    "24 or 25" is no number.  Powers, roots, mixed numbers are compared as text.  None (no answer) equals nothing.
    """
    texts = []
    for text in ("" if prediction is None else prediction, reference):
        marked = _marked(text)
        text = text.strip() if marked is None else marked
        texts.append(_clean(text) if len(text) <= MAX_ANSWER else "")
    values = [_value(text) for text in texts]
    if values == [None, None]:
        left, right = ("".join(text.split()) for text in texts)
        return left == right != ""
    return values[0] == values[1]


def _marked(text: str) -> str | None:
    start = end = -1
    opened = []  # per open brace: where its content starts, or -1 for a brace that is not a box
    # One pass over all braces: a scan per \boxed is quadratic on nested ones.
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\?[{}]", text):
        brace = match.group()
        if brace == "}" and opened:
            inside = opened.pop()
            if inside > start and text[inside:match.start()].strip():
                start, end = inside, match.start()
        elif brace[-1] == "{" and brace != r"\{":
            opened.append(-1 if brace == "{" else match.end())
    for match in reversed(list(_MARKER.finditer(text, max(end, 0)))):
        line = text[match.end():match.end() + MAX_ANSWER + 1].partition("\n")[0]
        line = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip(" \t\r*`")
        if line:
            return line
    if start < 0:
        return None
    content = text[start:end].strip()
    return _marked(content) or content  # \boxed{Answer: 24}; no deeper, for the last box holds no other box


def _clean(text: str) -> str:
    r"""Without the typography: LaTeX spacing and text commands, currency signs; \frac{a}{b} becomes a/b."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[!,;:()\[\]]|\^?\{?\\circ\}?|°", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\?[$€£]|\\\s|~", " ", re.sub(r"-\s*\\?[$€£]", "-", text))
    text = _FRAC.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)  # the space: 2\frac12 is not 21/2
    return text.lstrip(" \t\r\n*`'\"").rstrip(" \t\r\n*`'\".,;:")


def _value(text: str) -> Fraction | None:
    match = _VALUE.match(text)
    if not match:
        return None
    sign, top, bottom, unit = match.groups()
    if unit[:1].isalpha() or not all(len(w) > 1 and w.isalpha() and w.lower() not in _NOT_UNITS for w in unit.split()):
        return None  # 2x, 24 or 25, 3 million
    value, divisor = _fraction(sign + top), _fraction(bottom or "1")
    return value / divisor if value is not None and divisor else None


def _fraction(decimal: str) -> Fraction | None:
    mantissa, _, exponent = decimal.replace(",", "").lower().partition("e")
    if sum(map(str.isdigit, mantissa)) > MAX_DIGITS or len(exponent) > 9 or abs(int(exponent or 0)) > MAX_DIGITS:
        return None
    return Fraction(f"{mantissa}e{exponent or 0}")


# ---------------------------------------------------------------- programs and scores

OUTCOMES = ("compile_error", "timeout", "memory", "runtime_error", "failed_test", "passed", "no_tests")  # worst first
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)$")


def extract_code(text: str) -> str:
    """The last fenced block (``` or ~~~, any language tag; unclosed: to the end), else the text.  CRLF becomes LF.

    A lone fence after the code, as when the prompt had opened the block, ends the code.
    """
    blocks, fence, body, outside = [], None, [], []
    for line in text.lstrip("\ufeff").replace("\r\n", "\n").split("\n"):
        match = _FENCE.match(line)
        if fence is None and match:
            fence, body = match, []
        elif fence is None:
            outside.append(line)
        elif match and match[2].startswith(fence[2]) and not match[3].strip():
            blocks.append("\n".join(body))
            fence = None
        else:  # in a list item the block is indented with its fence
            body.append(line[len(fence[1]):] if line.startswith(fence[1]) else line)
    if fence is not None and "".join(body).strip():
        blocks.append("\n".join(body))
    return (blocks[-1] if blocks else "\n".join(outside)).lstrip("\ufeff")


@dataclass(frozen=True)
class Verdict:
    """What became of one program.  outcome: the worst over its tests, in the order of OUTCOMES; passed: how many of the
    total counting tests; detail: the first test with that outcome and what happened, for people to read."""

    outcome: str
    passed: int
    total: int
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "passed"


def exec_score(verdict: Verdict, style: str) -> float:
    """The reward of a program.  'binary': 1 or 0.  'pass_rate': passed / total.  'coderl': 1, -0.3 (a test failed),
    -0.6 (it crashed or hit a limit), -1 (does not compile).  'hybrid': 0.8 * pass rate, + 0.2 when it ran to the end,
    + 0.05 when it did not.  'no_tests' scores 0 in every style: equal over a whole group, hence without effect."""
    rate = verdict.passed / verdict.total if verdict.total else 0.0
    if style == "binary":
        return float(verdict.ok)
    if style == "pass_rate":
        return rate
    if style == "coderl":
        return {"passed": 1.0, "failed_test": -0.3, "compile_error": -1.0, "no_tests": 0.0}.get(verdict.outcome, -0.6)
    if style == "hybrid":
        bonus = {"passed": 0.2, "failed_test": 0.2, "compile_error": 0.0, "no_tests": 0.0}
        return 0.8 * rate + bonus.get(verdict.outcome, 0.05)
    raise ValueError(f"style must be 'binary', 'pass_rate', 'coderl' or 'hybrid', not {style!r}")


class SandboxError(RuntimeError):
    """The machinery failed, not the program: no verdict exists."""


def run_programs(programs: list[str], tests: list[list[dict]], *, timeout: float = 2.0, memory_mb: int = 1024,
                 workers: int | None = None) -> list[Verdict]:
    """Runs programs[i] against tests[i]; one Verdict per program, in the same order.

    tests      {"input", "output"}: one run with that stdin, whose stdout must have the same whitespace-separated tokens
               and whose exit status must be 0; {"assert"}: a statement executed after the program, the asserts of one
               program sharing one run.  A blank output or assert expects nothing and does not count.
    timeout    CPU seconds per run; the wall clock gets 2 * timeout + 0.5.  Nothing is run after a timeout.
    memory_mb  address space per process in MiB, about 30 of which are the interpreter's
    workers    helper processes; default: one per core, fewer for few jobs.  Equal jobs are run once.
    Raises ValueError naming the argument (an assert that is not Python, too), SandboxError when the machinery fails.
    """
    _check(programs, tests, timeout, memory_mb, workers)
    if not sys.platform.startswith("linux") or not hasattr(os, "fork"):
        raise SandboxError(f"run_programs needs fork and prctl of Linux, this platform is {sys.platform}; use Linux")
    keys = [(program, tuple((t.get("input"), t.get("output"), t.get("assert")) for t in own))
            for program, own in zip(programs, tests)]
    jobs, verdicts = deque(dict.fromkeys(keys)), {}
    workers = min(workers or min(os.cpu_count() or 1, math.ceil(len(jobs) / 4)), len(jobs))

    def work() -> None:
        helper = _Helper()
        try:
            while True:
                try:
                    key = jobs.popleft()  # atomic: the threads share the queue
                except IndexError:
                    return
                verdicts[key] = _run_job(helper, key, timeout, memory_mb)
        finally:
            helper.close()

    if jobs:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work) for _ in range(workers)]
            try:
                for future in futures:
                    future.result()
            finally:
                jobs.clear()  # after an error or Ctrl-C every thread ends with the job it is at
    return [verdicts[key] for key in keys]


def _check(programs, tests, timeout, memory_mb, workers) -> None:
    def need(condition, message: str) -> None:
        if not condition:
            raise ValueError(message)

    need(isinstance(programs, (list, tuple)), f"programs must be a list of strings, not {type(programs).__name__}")
    need(isinstance(tests, (list, tuple)), f"tests must be a list of lists, not {type(tests).__name__}")
    need(len(programs) == len(tests), f"programs and tests differ in length: {len(programs)} and {len(tests)}")
    need(isinstance(timeout, (int, float)) and 0 < timeout < 1e6, f"timeout must be positive seconds, not {timeout!r}")
    need(isinstance(memory_mb, int) and memory_mb >= 64, f"memory_mb must be an integer from 64 up, not {memory_mb!r}")
    need(workers is None or isinstance(workers, int) and workers > 0, f"workers must be 1 or more, not {workers!r}")
    statements = {}
    for i, (program, own) in enumerate(zip(programs, tests)):
        need(isinstance(program, str), f"programs[{i}] must be a string, not {type(program).__name__}")
        need(isinstance(own, (list, tuple)), f"tests[{i}] must be a list of tests, not {type(own).__name__}")
        for j, test in enumerate(own):
            where = f"tests[{i}][{j}]"
            need(isinstance(test, dict), f"{where} must be a dict, not {type(test).__name__}")
            keys = sorted(test.keys() & {"assert", "input", "output"})
            need(keys in (["assert"], ["input", "output"]),
                 f"{where} must have the key 'assert', or the keys 'input' and 'output'; it has {list(test)}")
            for key in keys:
                need(isinstance(test[key], str), f"{where}[{key!r}] must be a string, not {type(test[key]).__name__}")
            statements.setdefault(test.get("assert", ""), where)
    for statement, where in statements.items():
        try:
            compile(statement, "<assert>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{where}['assert'] is not a Python statement: {error}") from None


def _run_job(helper: _Helper, key: tuple, timeout: float, memory_mb: int) -> Verdict:
    program, tests = key
    stdin_tests = [(given, wanted) for given, wanted, _ in tests if wanted and wanted.strip()]
    asserts = [statement for _, _, statement in tests if statement and statement.strip()]
    total = len(stdin_tests) + len(asserts)
    if total == 0:
        return Verdict("no_tests", 0, 0, "no test expects anything")
    # keep: how many bytes of stdout come back.  200 asserts a run, because their reports must fit into a pipe.
    runs = [{"stdin": given, "keep": 65536 + 4 * len(wanted), "asserts": []} for given, wanted in stdin_tests]
    runs += [{"stdin": "", "keep": 0, "asserts": asserts[i:i + 200]} for i in range(0, len(asserts), 200)]
    job = {"program": program, "runs": runs, "timeout": timeout, "wall": 2 * timeout + 0.5, "memory_mb": memory_mb}
    replies = helper.ask(job, patience=30 + len(runs) * (job["wall"] + 6))

    results = []  # (outcome, detail) per test; shorter than total after a timeout
    for i, reply in enumerate(replies):
        if i < len(stdin_tests) and reply["results"][0][0] == "passed":  # so far: it ended well
            wanted, printed = stdin_tests[i][1], reply["stdout"]
            if printed.split() != wanted.split():
                reply["results"] = [("failed_test", f"expected {wanted[:80]!r}, printed {printed[:80]!r}")]
        results += reply["results"]
    outcomes = [outcome for outcome, _ in results]
    worst = min(outcomes, key=OUTCOMES.index)
    first = outcomes.index(worst)
    detail = "" if worst == "passed" else f"test {first + 1} of {total}: {results[first][1]}"
    return Verdict(worst, outcomes.count("passed"), total, detail)


class _Helper:
    """A helper process in its own session and folder.  Started when first asked; restarted once when it dies."""

    folder = process = None

    def ask(self, job: dict, patience: float) -> list[dict]:
        """Sends a job, returns a reply per run.  patience: seconds, the last resort when a helper was stopped."""
        line = json.dumps(job).encode() + b"\n"  # pure ASCII: also escapes the surrogates, which UTF-8 refuses
        for _ in range(2):
            try:
                if self.folder is None:
                    self.start()
                return self.exchange(line, time.monotonic() + patience)
            except (OSError, EOFError, ValueError) as error:
                problem = f"{error} {self.close()}".rstrip()
        raise SandboxError(f"the helper failed twice on one program: {problem}")

    def start(self) -> None:
        self.log = tempfile.TemporaryFile()
        self.folder = folder = tempfile.mkdtemp(prefix="verify-")
        env = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TMPDIR": folder + "/run"}
        # -S: no site-packages, a quick start.  Not -I, which ignores PYTHONHASHSEED and so makes set order random.
        self.process = subprocess.Popen([sys.executable, "-s", "-S", "-B", "-c", _HELPER], env=env, cwd=folder,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        start_new_session=True)

    def exchange(self, line: bytes, deadline: float) -> list[dict]:
        self.process.stdin.write(line)
        self.process.stdin.flush()
        stdout, reply = self.process.stdout.fileno(), bytearray()
        poll = select.poll()  # not select(), which fails on descriptors above 1023
        poll.register(stdout, select.POLLIN)
        while not reply.endswith(b"\n"):
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise EOFError("no reply in time")
            piece = os.read(stdout, 1 << 20)
            if not piece:
                raise EOFError("it died")
            reply += piece
        return json.loads(reply)

    def close(self) -> str:
        """Ends the process (a child of it dies with it), deletes the folder, returns what it wrote to stderr."""
        if self.folder is None:
            return ""
        if self.process is not None:
            self.process.kill()
            try:
                self.process.communicate()
            except OSError:  # the rest of a job has no reader any more
                pass
        _remove(self.folder)
        self.folder = self.process = None
        with self.log as log:
            log.seek(0)
            return log.read()[-2000:].decode(errors="replace")


# ---------------------------------------------------------------- inside the helper
# The functions from here on are sent to the helper as text (_HELPER).  They may use each other, the modules that
# _HELPER imports, and nothing else of this file.


def _serve() -> None:
    """One job per line of stdin, one line of replies each to stdout, until stdin ends."""
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    # Whoever started the trainer may have blocked or ignored the signals that the limits rely on.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGALRM, signal.SIGCHLD, signal.SIGPROF, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of the helper, which can kill them
    builtins.exit = builtins.quit = sys.exit  # honest programs use them, -S leaves them out
    sys.argv[:] = ["program.py"]
    gc.freeze()  # a collection in a child would write to, and so copy, every page
    os.mkdir("run", 0o700)  # the working folder of the programs
    for line in jobs:
        job, answers = json.loads(line), []
        for run in job["runs"]:
            answers.append(_run(job, run, null))
            if answers[-1]["results"][-1][0] in ("timeout", "compile_error"):
                break  # the other runs would only cost the same again
        os.write(replies, json.dumps(answers).encode() + b"\n")
    _remove(os.getcwd())  # the trainer is gone, or it would have killed us


def _run(job: dict, run: dict, null: int) -> dict:
    """One fork -> {"results": [[outcome, detail] per test], "stdout": str}."""
    stdin, stdout = _scratch(run["stdin"].encode("utf-8", "surrogatepass")), _scratch(b"")
    reader, writer = os.pipe()
    token = os.urandom(8).hex()
    pid = os.fork()
    if pid == 0:
        _child(job, run, (stdin, stdout, null, writer), token)
    late = []

    def stop(*_) -> None:
        late.append(True)
        _kill(pid)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, job["wall"])
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # not reaped yet, so that nobody else can get this pid
    signal.setitimer(signal.ITIMER_REAL, 0)
    _kill(pid)
    _, status, usage = os.wait4(pid, 0)
    _sweep()
    os.close(writer)
    lines = [line.decode() for line in os.read(reader, 1 << 16).split(b"\n") if line.startswith(token.encode())]
    printed = os.pread(stdout, run["keep"] + 1, 0).decode("utf-8", "replace")
    for fd in (stdin, stdout, reader):
        os.close(fd)
    try:
        clean = not os.listdir("run")  # then it can stay: mkdir and rmdir cost as much as the fork
    except OSError:
        clean = False
    if not clean:
        _remove("run")
        os.mkdir("run", 0o700)
    if not lines:
        raise RuntimeError(f"a child failed before its program started: wait status {status}")

    code = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime  # tells the SIGKILL of RLIMIT_CPU from that of the out-of-memory killer
    if late or code in (-signal.SIGPROF, -signal.SIGXCPU) or code < 0 and cpu > job["timeout"]:
        end = ["timeout", f"over {job['timeout']} s of CPU or {job['wall']} s in all"]
    elif code == -signal.SIGKILL:
        end = ["memory", "killed, probably for lack of memory"]
    elif code or run["asserts"]:
        end = ["runtime_error", f"ended with status {code} before this test was done"]
    else:
        end = ["passed", ""]
    results = [line.split("|", 2)[1:] for line in lines[1:]]
    return {"results": results + [end] * (len(run["asserts"] or [0]) - len(results)), "stdout": printed}


def _scratch(content: bytes) -> int:
    """A file without a name.  Unlike a pipe it never blocks, RLIMIT_FSIZE bounds it, and open(0) and seek work."""
    fd = os.open("scratch", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("scratch")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _child(job: dict, run: dict, fds: tuple[int, int, int, int], token: str) -> None:
    """Limits, program, tests, in the forked child.  Never returns."""
    write, evaluate, leave = os.write, exec, os._exit  # bound now: a program may replace them in os and builtins

    def report(outcome: str, detail: str = "") -> None:
        text = f"{token}|{outcome}|{' '.join(detail[:200].split())}"
        write(3, text.encode("ascii", "backslashreplace")[:200] + b"\n")

    def attempt(work, *arguments) -> tuple[str, str]:
        try:
            work(*arguments)
            return "passed", ""
        except MemoryError:
            return "memory", "MemoryError"
        except BaseException as error:
            outcome = "failed_test" if isinstance(error, AssertionError) else "runtime_error"
            try:
                return outcome, f"{type(error).__name__}: {error}"
            except BaseException:  # a __str__ of the program
                return outcome, type(error).__name__

    def program() -> None:
        try:
            evaluate(code, main.__dict__)
        except SystemExit as stop:
            if run["asserts"] or stop.code not in (None, 0):  # an early exit skips the asserts
                raise
        if not run["asserts"]:
            _wind_down(main)

    try:
        os.setsid()  # a session leader cannot leave its process group
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the helper
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for target, fd in enumerate(fds):  # stdin, stdout, stderr to nowhere, 3: reports
            os.dup2(fd, target, inheritable=target < 3)
        os.closerange(4, 256)
        os.chdir("run")
        for kind, value in ((resource.RLIMIT_AS, job["memory_mb"] << 20), (resource.RLIMIT_FSIZE, 16 << 20),
                            (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
                            (resource.RLIMIT_CPU, int(job["timeout"]) + 1)):
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        report("ready")
        tests = [compile(text, "<assert>", "exec") for text in run["asserts"]]
        main = sys.modules["__main__"] = type(sys)("__main__")
        signal.setitimer(signal.ITIMER_PROF, job["timeout"])  # the CPU limit; RLIMIT_CPU, in whole seconds, backs it up
        try:
            code = compile(job["program"], "<program>", "exec")
        except BaseException as error:  # SyntaxError, null bytes, surrogates, nesting too deep for the parser
            outcome, detail = "compile_error", f"{type(error).__name__}: {error}"
        else:
            outcome, detail = attempt(program)
        if outcome == "passed":
            for test in tests:
                report(*attempt(evaluate, test, main.__dict__))
        else:
            for _ in tests or [None]:  # an AssertionError outside the tests is a crash
                report("runtime_error" if outcome == "failed_test" else outcome, detail)
        leave(0)
    finally:
        leave(70)


def _wind_down(main) -> None:
    """What an interpreter does at a normal end and os._exit leaves out: join threads, exit handlers, flush."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    main.__dict__.clear()  # closes, and so flushes, files that the program opened on descriptor 1
    for stream in {sys.stdout, sys.__stdout__}:
        if not getattr(stream, "closed", True):
            stream.flush()


def _kill(pid: int) -> None:
    for kill in (os.kill, os.killpg):  # the first for the moment before the child's setsid
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _sweep() -> None:
    """Kills and reaps the descendants that are left; those that fled by setsid are direct children by now."""
    for _ in range(10_000):
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                with open(f"/proc/self/task/{os.getpid()}/children") as children:
                    for pid in children.read().split():
                        _kill(int(pid))
                time.sleep(0.0005)
        except OSError:  # no child left, or no such file on this kernel
            return
    raise RuntimeError("the processes that a program left behind cannot be killed")


def _remove(folder: str) -> None:
    """Deletes a folder, even one too deep for shutil.rmtree or with its permissions taken away."""
    import subprocess  # here, for the helper rarely needs it
    # rm first: chmod would follow a link put in the place of the folder.
    command = 'rm -rf "$0" || { chmod -R u+rwx "$0"; rm -rf "$0"; }'
    subprocess.run(["/bin/sh", "-c", command, folder], stderr=subprocess.DEVNULL)


# The second line is for the programs: what the helper has loaded costs them nothing.
_HELPER = """import atexit, builtins, ctypes, gc, json, os, resource, signal, sys, time
import bisect, collections, functools, heapq, itertools, math, operator, re, string
libc = ctypes.CDLL(None)
""" + "\n".join(map(inspect.getsource, (_serve, _run, _scratch, _child, _wind_down, _kill, _sweep, _remove))) + """
_serve()
"""


def main(arguments: list[str]) -> int:
    try:
        program_path, tests_path = arguments
        with open(program_path, encoding="utf-8") as program, open(tests_path, encoding="utf-8") as tests:
            verdict = run_programs([program.read()], [json.load(tests)])[0]
    except (OSError, ValueError, SandboxError) as error:
        usage = "usage: python verify.py PROGRAM.py TESTS.json"
        print(usage if len(arguments) != 2 else f"verify.py: {error}", file=sys.stderr)
        return 2
    print(f"{verdict.outcome} {verdict.passed}/{verdict.total} {verdict.detail}".rstrip())
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
