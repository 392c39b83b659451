"""verify.py at its edges: answers, code blocks, honest programs, and programs that attack the verdict."""
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import verify  # noqa: E402
from verify import SandboxError, Verdict, exec_score, extract_answer, extract_code, math_equal, run_programs  # noqa: E402


def run(program, *tests, **options):
    return run_programs([program], [list(tests)], **options)[0]


def io(given, wanted):
    return {"input": given, "output": wanted}


def check(statement):
    return {"assert": statement}


# ---------------------------------------------------------------- answers

@pytest.mark.parametrize("text, answer", [
    ("24", "24"), (" 24", "24"), ("24.\n\n", "24"), ("-7", "-7"), ("3/4", "3/4"), ("1,234", "1,234"), ("50%", "50%"),
    ("so 4 + 5 = 9", "9"), ("10-5", "5"), ("7 coins\nthen 8 coins\n", "8"), ("it costs $5.50.", "5.50"),
    ("She has 3.\n#### 1,234", "1,234"), ("The answer is 24. It was 3 * 8.", "24"), ("**Answer:** 24", "24"),
    ("Answer:\n24", "24"), ("Final answer: 24 or 25", "24 or 25"), ("the answer is 3\n#### 4", "4"),
    ("#### 4\nso the answer is 3", "3"), (r"\boxed{3} and \boxed{4}", "4"),
    (r"answer is $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
    (r"\boxed{4} #### 5", "5"), (r"#### 5 \boxed{4}", "4"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{3} \boxed{4", "3"),
    (r"\boxed{}", None), ("24\nno number here", None), ("", None), ("\n \n", None), ("Answer:", None),
    ("#### " + "1" * 5000, None),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("prediction, reference", [
    ("24", "24"), (" 24", "24"), ("24.0", "24"), ("+24", "24"), ("1,234", "1234"), ("$1,234.50", "1234.5"),
    ("-$5", "-5"),
    ("50%", "50"), (r"50\%", "50"), ("0.5", "1/2"), (r"\frac{1}{2}", ".5"), (r"-\dfrac12", "-0.5"), ("2/6", "1/3"),
    ("24 coins left", "24"), ("x = 24", "24"), (r"24\text{ cm}", "24"), (r"1{,}234", "1234"), ("$24$", "24"),
    (r"\boxed{24}", "... so it is 24\n#### 24"), ("the answer is 24.", "24"), (r"\boxed{Answer: 24}", "24"),
    ("1e3", "1000"), ("1e400", "10e399"),
    ("9" * 399, "9" * 399 + ".0"), ("x+1", "x + 1"), ("24 or 25", "24 or 25"), ("\u22125", "-5"), (r"90^\circ", "90"),
])
def test_equal_answers(prediction, reference):
    assert math_equal(prediction, reference)
    assert math_equal(reference, prediction)


@pytest.mark.parametrize("prediction, reference", [
    ("50%", "0.5"), ("24", "25"), ("24 or 25", "24"), ("24 or 25", "25"), ("0.333333333333333333", "1/3"), ("", ""),
    (" ", " "), (None, "24"), ("24!", "24"), ("2^3", "8"), ("2x", "2"), ("3 million", "3"), ("24 or more", "24"),
    (r"2\frac{1}{2}", "21/2"), ("1/0", "0"), ("1,23", "123"), ("9" * 401, "9" * 401 + ".0"), ("1e401", "10e400"),
    ("twenty", "20"), ("\u0662\u0664", "24"), ("-5", "5"), (r"2\pi", "2"), ("0." + "3" * 5000, "0." + "3" * 5000),
])
def test_different_answers(prediction, reference):
    assert not math_equal(prediction, reference)


@pytest.mark.parametrize("text", [
    "\\boxed{" * 30_000, "\\boxed{" * 30_000 + "}" * 30_000, "answer is " * 30_000, "1" * 300_000, "1," * 150_000,
    "####" * 50_000, "\\text{" * 40_000, "-" * 200_000, "{" * 200_000, "}" * 200_000, "answer:\n" * 30_000,
    "1e" + "9" * 3000, "\ud800 \x00 #### \udfff", "\\frac{" * 30_000, "a " * 1900 + "1", "answer" + " " * 200_000,
])
def test_hostile_text_is_quick_and_never_raises(text):
    started = time.process_time()
    extract_answer(text)
    assert math_equal(text, "24") is False
    assert math_equal(extract_answer(text), "24") is False
    assert time.process_time() - started < 2


# ---------------------------------------------------------------- code blocks

@pytest.mark.parametrize("text, code", [
    ("x = 1", "x = 1"), ("```python\nx = 1\n```", "x = 1"), ("```py\nx = 1\n```\nbye", "x = 1"),
    ("~~~python3\nx = 1\n~~~", "x = 1"),
    ("```\na\n```\nor\n```\nb\n```", "b"), ("hi\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    ("```\r\nx\r\ny\r\n```\r\n", "x\ny"),
    ("\ufeffx = 1", "x = 1"), ("\ufeff```\n\ufeffx = 1\n```", "x = 1"), ("~~~\n```\n~~~", "```"),
    ("````\n```\n````", "```"),
    ("x = 1\n```\n", "x = 1"), ("```\na\n```\n```", "a"),
    ("1. so\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
    ("print('```')", "print('```')"), ("", ""),
])
def test_extract_code(text, code):
    assert extract_code(text) == code


# ---------------------------------------------------------------- scores

@pytest.mark.parametrize("outcome, passed, total, binary, rate, coderl, hybrid", [
    ("passed", 4, 4, 1, 1, 1, 1), ("failed_test", 1, 4, 0, 0.25, -0.3, 0.4), ("failed_test", 0, 4, 0, 0, -0.3, 0.2),
    ("runtime_error", 2, 4, 0, 0.5, -0.6, 0.45), ("timeout", 1, 4, 0, 0.25, -0.6, 0.25),
    ("memory", 0, 4, 0, 0, -0.6, 0.05),
    ("compile_error", 0, 4, 0, 0, -1, 0), ("no_tests", 0, 0, 0, 0, 0, 0),
])
def test_exec_score(outcome, passed, total, binary, rate, coderl, hybrid):
    verdict = Verdict(outcome, passed, total, "")
    scores = [exec_score(verdict, style) for style in ("binary", "pass_rate", "coderl", "hybrid")]
    assert scores == pytest.approx([binary, rate, coderl, hybrid])
    assert verdict.ok == (outcome == "passed")


def test_unknown_style():
    with pytest.raises(ValueError, match="style"):
        exec_score(Verdict("passed", 1, 1, ""), "best")


# ---------------------------------------------------------------- honest programs

@pytest.mark.parametrize("program", [
    "print(sum(map(int, input().split())))",
    "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "print(sum(map(int, open(0).read().split())))",
    "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "import sys\nsys.stdin.seek(0) if sys.stdin.seekable() else 0\nsys.stdout.write(str(sum(map(int, sys.stdin.readline().split()))))",
    "if __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    exit()",
    "print(sum(map(int, input().split())))\nquit(0)",
    "import sys, threading\nthreading.stack_size(1 << 27)\nsys.setrecursionlimit(10**6)\n"
    "def f(n): return n and f(n - 1)\ndef main(): f(20000); print(sum(map(int, input().split())))\n"
    "threading.Thread(target=main).start()",
    "import atexit\nout = []\natexit.register(lambda: print(*out))\nout.append(sum(map(int, input().split())))",
    "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
    "import io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb'), write_through=False)\nprint(sum(map(int, input().split())))",
    "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\nopen('a.txt', 'w').write('x')\nprint(sum(map(int, input().split())))",
    "import asyncio\nasync def main(): print(sum(map(int, input().split())))\nasyncio.run(main())",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: 'int'\nprint(A(sum(map(int, input().split()))).n)",
])
def test_honest_stdin_programs(program):
    verdict = run(program, io("1 2 3\n", " 6 \n\n"))
    assert verdict.ok, verdict


def test_honest_assert_program():
    program = "import math\ndef f(x):\n    return math.sqrt(x)\nif __name__ == '__main__':\n    y = 5"
    assert run(program, check("assert f(4) == 2"), check("assert f(9) == 3, 'nine'"), check("assert y == 5")) == Verdict(
        "passed", 3, 3, "")


def test_kinds_can_be_mixed_and_many_asserts_fit():
    program = "def f(x):\n    return x\nprint(1)"
    tests = [io("", "1")] + [check(f"assert f({i}) == {i}") for i in range(450)] + [check("assert f(1) == 2, 'é' * 999")] * 450
    verdict = run(program, *tests)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("failed_test", 451, 901)


def test_set_order_does_not_change_between_calls():
    program = "print(*{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"
    order = run(program, io("", "?")).detail
    assert "printed" in order
    assert all(run(program, io("", "?")).detail == order for _ in range(3))


def test_long_honest_output_and_input():
    numbers = " ".join(map(str, range(60_000)))
    assert run("print('\\n'.join(input().split()))", io(numbers, numbers)).ok


# ---------------------------------------------------------------- outcomes

@pytest.mark.parametrize("program, outcome", [
    ("print(1", "compile_error"), ("x = '\0'", "compile_error"), ("x = '\ud800'", "compile_error"),
    ("(" * 5000 + ")" * 5000, "compile_error"), ("return 1", "compile_error"),
    ("print(2)", "failed_test"), ("", "failed_test"), ("print('1 1')", "failed_test"),
    ("1 / 0", "runtime_error"), ("assert False", "runtime_error"), ("print(1); exit(3)", "runtime_error"),
    ("import sys; print(1); sys.exit('bad')", "runtime_error"), ("print(1); import os; os._exit(1)", "runtime_error"),
    ("def f(n): return f(n + 1)\nf(0)", "runtime_error"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "runtime_error"),
    ("x = bytearray(3 << 30)", "memory"), ("x = []\nwhile True: x.append(bytes(50 << 20))", "memory"),
    ("raise MemoryError", "memory"), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory"),
])
def test_outcomes(program, outcome):
    stdin_verdict, assert_verdict = run_programs([program, program], [[io("", "1")], [check("assert False")]])
    assert (stdin_verdict.outcome, stdin_verdict.passed, stdin_verdict.total) == (outcome, 0, 1)
    assert stdin_verdict.detail.startswith("test 1 of 1: ")
    if "print" not in program or outcome == "compile_error":
        assert assert_verdict.outcome == outcome


def test_asserts_count_separately_and_the_worst_names_the_outcome():
    program = "def f(x):\n    return [1, 2][x]"
    tests = [check("assert f(0) == 1"), check("assert f(1) == 1"), check("assert f(2)"), check("assert f(1) == 2")]
    verdict = run(program, *tests)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("runtime_error", 2, 4)
    assert "test 3 of 4" in verdict.detail and "IndexError" in verdict.detail
    assert run(program, *tests[:2]).outcome == "failed_test"


def test_all_tests_are_run_after_a_failure_but_none_after_a_timeout():
    failing = run("print(7)", io("", "1"), io("", "7"), io("", "2"), io("", "7"))
    assert (failing.outcome, failing.passed, failing.total) == ("failed_test", 2, 4)
    started = time.monotonic()
    late = run("if input() == 'go':\n    while True: pass\nprint(1)", io("x", "1"), *[io("go", "1")] * 9, timeout=0.3)
    assert (late.outcome, late.passed, late.total) == ("timeout", 1, 10)
    assert time.monotonic() - started < 2.5  # nine time-outs would take 2.7 s of CPU


def test_asserts_before_a_timeout_count():
    verdict = run("def f(x):\n    while x: pass\n    return 1", check("assert f(0)"), check("assert f(1)"), check("assert f(0)"), timeout=0.3)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("timeout", 1, 3)


def test_timeouts():
    programs = ["while True: pass", "import time; time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
                "try:\n    while True: pass\nexcept BaseException:\n    print(1)", "9 ** 9 ** 9"]
    started = time.monotonic()
    verdicts = run_programs(programs, [[io("", "1")]] * 5, timeout=0.3, workers=5)
    assert [v.outcome for v in verdicts] == ["timeout"] * 5
    assert time.monotonic() - started < 6


def test_a_program_that_ignores_the_signals_is_late_and_not_out_of_memory():
    program = "import signal\nfor s in (signal.SIGPROF, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    assert run(program, io("", "1"), timeout=0.8).outcome == "timeout"  # RLIMIT_CPU ends it with SIGKILL


def test_a_test_that_expects_nothing_does_not_count():
    assert run("", io("", ""), io("1", " \n"), check("  ")) == Verdict("no_tests", 0, 0, "no test expects anything")
    assert run("").outcome == "no_tests"
    assert run("print(1)", io("", ""), io("", "1")) == Verdict("passed", 1, 1, "")


# ---------------------------------------------------------------- attacks

TESTS = [check("assert f(1) == 2"), check("assert f(2) == 3")]


@pytest.mark.parametrize("program", [
    "import os; os._exit(0)", "import sys; sys.exit(0)", "exit()", "raise SystemExit",
    "import os\ndef f(x): os._exit(0)", "def f(x): exit()",
    "import builtins\nbuiltins.exec = lambda *a: None", "import builtins\nbuiltins.compile = lambda *a: 'pass'",
    "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\ndef f(x): return 0",
    "import os\nold = os.write\nos.write = lambda fd, data: old(fd, data.replace(b'failed_test', b'passed'))\ndef f(x): return 0",
    "import os\nos.write(3, b'passed\\n' * 9)\ndef f(x): return 0",
    "import os\nos.write(3, b'0123456789abcdef|passed|\\n' * 9)\nos._exit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "import sys\nsys.excepthook = lambda *a: None\ndef f(x): raise KeyboardInterrupt",
    "import os\nos.close(3)\ndef f(x): return 2", "import os\nos.fork()\ndef f(x): return 0",
    "print('passed')\n__name__ = 'x'\ndef f(x): return 0",
])
def test_forged_passes(program):
    verdict = run(program, *TESTS)
    assert verdict.passed == 0 and verdict.total == 2 and not verdict.ok


def test_a_right_program_that_exits_early_has_not_passed():
    verdict = run("def f(x): return x + 1\nexit()", *TESTS)
    assert (verdict.outcome, verdict.passed) == ("runtime_error", 0) and "SystemExit" in verdict.detail


def test_an_early_exit_keeps_the_asserts_before_it():
    verdict = run("import os\ndef f(x): return 2 if x == 1 else os._exit(0)", *TESTS)
    assert (verdict.outcome, verdict.passed) == ("runtime_error", 1)


def test_no_secret_in_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    program = "import os; print(*sorted(set(os.environ) - {'LC_CTYPE'}))"  # which Python itself sets in the C locale
    assert run(program, io("", "PATH PYTHONHASHSEED PYTHONUTF8 TMPDIR")).ok


def test_expected_outputs_are_not_in_the_child():
    program = ("import sys\nframe, seen = sys._getframe(), ''\nwhile frame:\n    seen += repr(frame.f_locals)\n"
               "    frame = frame.f_back\nprint('program' in seen, 'sesa' + 'me' in seen)")
    assert run(program, io("open", "True False"), io("x", "sesame")).passed == 1


@pytest.mark.parametrize("program, outcome", [
    ("while True: print('x' * 100000)", "runtime_error"),
    ("import os\nwhile True: os.write(1, b'x' * 1000000)", "runtime_error"),
    ("import os\nwhile True: os.write(3, b'x' * 1000000)", "timeout"),
    ("print('x ' * 1000000)", "failed_test"),
    ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 1000000)", "runtime_error"),
    ("fs = [open(str(i), 'w') for i in range(1000)]", "runtime_error"),
])
def test_floods(program, outcome):
    verdict = run(program, io("", "1"), timeout=0.6)
    assert verdict.outcome == outcome and len(verdict.detail) < 500


def alive(marker):
    """Processes whose command line holds the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            pass
    return found


@pytest.mark.skipif(not os.path.exists(f"/proc/self/task/{os.getpid()}/children"), reason="no list of children in /proc")
@pytest.mark.parametrize("detach", ["", "os.setsid()", "os.setsid()\n    if os.fork(): os._exit(0)", "os.setpgid(0, 0)"])
def test_stray_processes_die(detach):
    marker = f"stray-{os.getpid()}-{time.monotonic_ns()}"
    program = (f"import os, sys, time\nif os.fork() == 0:\n    {detach or 'pass'}\n"
               f"    os.execv({sys.executable!r}, ['python', '-c', 'import time; time.sleep(60)', {marker!r}])\n"
               "time.sleep(0.1)\nprint(1)")
    started = time.monotonic()
    verdict = run(program, io("", "1"))  # the stray keeps stdout open: nobody may wait for it
    assert verdict.ok, verdict
    assert time.monotonic() - started < 5
    assert alive(marker) == []


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("program", [
    "open('a', 'w').write('x')", "import os\nos.makedirs('a/b/c')\nos.chmod('a/b', 0)\nos.chmod('a', 0)",
    "import os\nos.rmdir(os.getcwd())", "import tempfile\ntempfile.mkstemp()", "open('../a', 'w').write('x')",
    "while True: pass", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
])
def test_no_file_stays(program, temporary):
    look = "import os\nprint(len(os.listdir('.')))"
    try:
        verdicts = run_programs([program, look], [[io("", "1")], [io("", "0")]], workers=1, timeout=0.5)
        assert verdicts[1].ok  # what one program wrote, the next does not see
    except SandboxError:
        assert "getppid" in program
    assert list(temporary.iterdir()) == []


def test_a_link_in_place_of_the_working_folder_harms_nobody(temporary):
    (temporary / "precious").mkdir()
    (temporary / "precious" / "file").write_text("x")
    (temporary / "precious").chmod(0o500)
    program = f"import os\nhere = os.getcwd()\nos.chdir('..')\nos.rmdir(here)\nos.symlink({str(temporary / 'precious')!r}, here)\nprint(1)"
    assert run(program, io("", "1")).ok
    assert (temporary / "precious" / "file").read_text() == "x"
    assert (temporary / "precious").stat().st_mode & 0o777 == 0o500
    (temporary / "precious").chmod(0o700)


def test_no_descriptor_and_no_thread_leaks():
    run("print(1)", io("", "1"))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    run_programs(["print(1)", "import os, signal; os.kill(os.getpid(), 9)", "while True: pass"], [[io("", "1")]] * 3, timeout=0.2, workers=3)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


# ---------------------------------------------------------------- the machinery

def test_order_duplicates_and_workers():
    programs = [f"print({i % 7})" for i in range(30)]
    tests = [[io("", str(i % 5))] for i in range(30)]
    for workers in (None, 1, 3):
        assert [v.ok for v in run_programs(programs, tests, workers=workers)] == [i % 7 == i % 5 for i in range(30)]


def test_equal_jobs_run_once(monkeypatch):
    seen = []
    original = verify._run_job
    monkeypatch.setattr(verify, "_run_job", lambda helper, key, *rest: seen.append(key) or original(helper, key, *rest))
    verdicts = run_programs(["print(1)"] * 5 + ["print(2)"], [[io("", "1")]] * 4 + [[io("", "2")]] * 2)
    assert [v.ok for v in verdicts] == [True] * 4 + [False, True]
    assert len(seen) == 3


def test_empty():
    assert run_programs([], []) == []


def test_several_threads_at_once():
    results = {}

    def work(n):
        results[n] = run_programs([f"print({n})", "print('x')"], [[io("", str(n))]] * 2)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([v.ok for v in results[n]] == [True, False] for n in range(4))


def test_blocked_and_ignored_signals_of_the_trainer_do_not_matter():
    code = (f"import sys, signal; sys.path.insert(0, {str(ROOT)!r}); import verify\n"
            "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU])\n"
            "t = [{'input': '', 'output': '1'}]\n"
            "print([v.outcome for v in verify.run_programs(['print(1)', 'while 1: pass', 'import time; time.sleep(9)'], [t] * 3, timeout=0.2)])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['passed', 'timeout', 'timeout']", done.stderr


@pytest.mark.parametrize("arguments, named", [
    ((["x"], []), "length"), (("x", [[]]), "programs"), (([1], [[]]), r"programs\[0\]"), ((["x"], "x"), "tests"),
    ((["x"], [{}]), r"tests\[0\]"), ((["x"], [["a"]]), r"tests\[0\]\[0\]"), ((["x"], [[{"input": ""}]]), "output"),
    ((["x"], [[{"output": ""}]]), "input"), ((["x"], [[{"input": 1, "output": ""}]]), "'input'"),
    ((["x"], [[{}]]), "assert"),
    ((["x"], [[{"input": "", "output": None}]]), "'output'"), ((["x"], [[{"assert": 1}]]), "'assert'"),
    ((["x"], [[{"assert": "", "input": ""}]]), "assert"),
    ((["x"], [[{"assert": "assert ("}]]), r"tests\[0\]\[0\]\['assert'\]"),
])
def test_bad_programs_and_tests(arguments, named):
    with pytest.raises(ValueError, match=named):
        run_programs(*arguments)


@pytest.mark.parametrize("name, value", [
    ("timeout", 0), ("timeout", -1), ("timeout", float("nan")), ("timeout", "2"), ("timeout", float("inf")),
    ("memory_mb", 0), ("memory_mb", 1.5), ("workers", 0), ("workers", -1), ("workers", 1.5),
])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=name):
        run_programs(["x"], [[]], **{name: value})


def test_a_program_that_kills_its_helper_is_no_verdict(temporary):
    with pytest.raises(SandboxError, match="twice"):
        run("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", io("", "1"))
    assert list(temporary.iterdir()) == []


def test_a_helper_that_dies_once_is_replaced(tmp_path):
    # The story: the out-of-memory killer takes the helper, not the program.
    flag = tmp_path / "flag"
    program = f"import os\nif not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w')\n    os.kill(os.getppid(), 9)\nprint(1)"
    assert [v.ok for v in run_programs(["print(1)", program, "print(1)"], [[io("", "1")]] * 3, workers=1)] == [True] * 3


def test_no_interpreter_and_no_fork(monkeypatch, temporary):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(SandboxError, match="nonexistent"):
            run("print(1)", io("", "1"))
    assert list(temporary.iterdir()) == []
    monkeypatch.delattr(os, "fork")
    with pytest.raises(SandboxError, match="fork"):
        run("print(1)", io("", "1"))


def test_a_broken_helper_says_why(monkeypatch):
    monkeypatch.setattr(verify, "_HELPER", "raise RuntimeError('no such luck')")
    with pytest.raises(SandboxError, match="no such luck"):
        run("print(1)", io("", "1"))


def test_command_line(tmp_path):
    program, tests = tmp_path / "p.py", tmp_path / "t.json"
    program.write_text("print(int(input()) + 1)")

    def call(*arguments):
        done = subprocess.run([sys.executable, str(ROOT / "verify.py"), *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    tests.write_text(json.dumps([io("1", "2")]))
    assert call(program, tests)[:2] == (0, "passed 1/1\n")
    tests.write_text(json.dumps([io("1", "2"), io("1", "3")]))
    code, out, _ = call(program, tests)
    assert code == 1 and out.startswith("failed_test 1/2 test 2 of 2")
    code, _, err = call(program)
    assert code == 2 and "usage" in err
    tests.write_text("[")
    code, _, err = call(program, tests)
    assert code == 2 and "Traceback" not in err
