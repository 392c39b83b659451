"""verify.py at its edges: answers, code blocks, honest programs, and programs that attack the verdict."""
import contextlib
import ctypes
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import verify  # noqa: E402
from verify import SandboxError, Verdict, exec_score, extract_answer, extract_code, math_equal, run_programs  # noqa: E402


def run(program, *tests, **options):
    return run_programs([program], [list(tests)], **options)[0]


def io(given, wanted):
    return {"input": given, "output": wanted}


def check(statement):
    return {"assert": statement}


def kinds(*programs, **options):
    """Outcomes of programs that shall print 1."""
    return [verdict.outcome for verdict in run_programs(programs, [[io("", "1")]] * len(programs), **options)]


# ---------------------------------------------------------------- answers

THIN = "\u2009"

@pytest.mark.parametrize("text, answer", [
    ("24", "24"), (" 24", "24"), ("24.\n\n", "24"), ("-7", "-7"), ("3/4", "3/4"), ("1,234", "1,234"), ("50%", "50%"),
    ("so 4 + 5 = 9", "9"), ("7 coins\nthen 8 coins\n", "8 coins"), ("it costs $5.50.", "5.50"), ("it is 1 1/2", "1 1/2"),
    ("She has 3.\n#### 1,234", "1,234"), ("The answer is 24. It was 3 * 8.", "24"), ("**Answer:** 24", "24"),
    ("Answer:\n24", "24"), ("Final answer: 24 or 25", "24 or 25"), ("the answer is 3\n#### 4", "4"),
    ("#### 4\nso the answer is 3", "3"), (r"\boxed{3}, no: \boxed{4}", "3 or 4"), (r"\boxed{3} \boxed{4}", "3 or 4"),
    (r"\boxed{4} and again \boxed{4}", "4"), ("\\boxed{3} is not it. So\n\\boxed{4}", "4"),
    (r"answer is $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"), ("the answer is Rs. 50. Good.", "Rs. 50"),
    (r"\boxed{4} #### 5", "5"), (r"#### 5 \boxed{4}", "4"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{3} \boxed{4", "3"),
    (r"\boxed{}", None), ("24\nno number here", None), ("", None), ("\n \n", None), ("Answer:", None),
    ("#### " + "1" * 5000, None), ("10-5", "10-5"), ("3 or 4", "3 or 4"), ("41, 42, 43", "42, 43"), ("42 43", "42 43"),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


EQUAL = [
    ("24", "24"), (".5", "0.5"), (r"1{,}234", "1234"), (r"1\,234", "1234"), ("1,\\!000", "1000"), ("-$5", "-5"),
    ("$-5$", "-5"), ("$1,234.50", "1234.5"), ("USD 5", "5"), ("€5.50", "5.5"), ("5 €", "5"), ("2.50 dollars", "$2.5"),
    (r"50\%", "50"), (r"24\text{ cm}", "24"), ("5cm", "5"), (r"5\text{ cm}^2", "5"), ("5 cm²", "5"), ("90°", "90"),
    ("x = 24", "24"), (r"\frac{1}{2}", ".5"), (r"\dfrac{3}{4}", "0.75"), (r"\tfrac34", ".75"),
    (r"\frac{-3}{4}", "-.75"), (r"-\frac{3}{4}", "-.75"), ("1e-3", "0.001"), (r"1.5 \times 10^3", "1500"),
    (r"1.5\times10^{3}", "1500"), ("2 x 10^-3", "0.002"), ("(1, 2)", "(1,2)"),
    (r"\left(1, \frac{1}{2}\right)", "(1, 0.5)"), (r"\{1,2\}", r"\{2, 1\}"), (r"\{1,2\}", "{1.0,2}"),
    ("{(1,2),(3,4)}", "{(3,4),(1,2)}"), ("1, 2", "1,2"), ("(5)", "5"), ("Yes", "yes"), (r"\text{Yes}", "yes"),
    ("(B)", "b"), (r"\text{(B)}", "B"), ("x+1", "x + 1"), ("New  York", "new york"),
    (r"\boxed{24}", "... so it is 24\n#### 24"), ("3:30", "3:30"), ("the answer is 24.", "24"),
    ("24 or 25", "24 or 25"), ('f(3) = 9', '9'), ('x \\in [1, 4)', '[1,4)'), ('x\\in\\{1,2\\}', '\\{1,2\\}'),
    ('3 and 4', '3, 4'), ('\\frac{\\sqrt{5}}{3}', '\\frac{\\sqrt5}{3}'), ('5³', '5^3'), ('√7', '\\sqrt{7}'),
    ('x>=4', 'x \\ge 4'), ('\\frac{3}{-4}', '-3/4'), ('\\frac{-3}{-4}', '3/4'), ('option B', 'B'), ('B.', 'B'),
    ('101_{2}', '101_2'), ('101₂', '101_2'), ('5\\pi \\text{ cm}^2', '5\\pi'), ('5π square meters', '5\\pi'),
    ('2\\sqrt{3} units', '2\\sqrt{3}'), ('\\displaystyle\\frac{7}{8}', '7/8'), ('\\textbf{36}', '36'),
    ('m + n + p = 40', '40'), ('12 ÷ 4 = 3', '3'), ('$130 - $60 = $70', '70'), ('a profit of $70', '70'),
    ('3 million', '3 million'), ('\\begin{bmatrix}1\\\\2\\end{bmatrix}', '\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}'),
    ('\\begin{pmatrix}\\frac12\\\\2\\end{pmatrix}', '\\begin{pmatrix} 0.5 \\\\2 \\end{pmatrix}'), ('{{7}}', '7'),
    ('e^{-x}', 'e^{-x}'), ('x**2', 'x^2'), ('\\left\\{3,4\\right\\}', '\\{4,3\\}'), ('y = 2x+1', 'y=2x+1'),
    ("12 o'clock", "12 o'clock"), ('(3,-2)', '\\left(3,-2\\right)'), ('\\dfrac{\\pi}{3}', 'π/3'), ('y=x^{2}', 'y = x²'),
    ('\\frac{x+1}{2}', '(x+1)/2'), ('20\\,\\mathrm{m/s^2}', '20'), ('\\sqrt{2}+1', '\\sqrt2 + 1'),
    ('\\left(\\frac{3}{2}, 4\\right)', '(1.5, 4)'), ("\\frac{50}{3}\\%", "\\frac{50}{3}"),
    ("(-\\infty, +\\infty)", "(-\\infty,\\infty)"), ("\\ln{5}", "\\ln 5"), ("\\cos(x)", "\\cos x"),
    ("7\\cdot\\sqrt5", "7\\sqrt{5}"), ("3\\cdot\\pi", "3\\pi"), ("-(3/4)", "-0.75"),
    ("-\\left(\\frac{3}{4}\\right)", "-3/4"), ("\\{ \\}", "\\varnothing"), ("x=-2 or x=2", "$x=-2$ or $x=2$"),
    ("\\begin{pmatrix}3\\\\4\\\\\\end{pmatrix}", "\\begin{pmatrix}3\\\\4\\end{pmatrix}"),
]


def test_equal_answers():
    assert [pair for pair in EQUAL if not math_equal(*pair)] == []


DIFFERENT = [
    ("24", "25"), ("-5", "5"), ("1,2", "12"), ("1.000.000", "1000000"), ("3 or 4", "3"), ("2x", "2"),
    ("24 or more", "24"), ('7 or so', '7'), ("#### 42 43", "42"), ("41, 42, 43", "42"), ("5 - 3", "5"),
    ("between 3 and 4", "3"), ('5 and 6', '5'), ("3, maybe 4", "3"), (r"\boxed{3} \boxed{4}", "3"),
    (r"\boxed{3} or \boxed{4}", "4"), ("x=5 or x=6", "5"), ('2x=10', '10'), ("not 5", "5"), ("3 million", "3"),
    ("about 5", "5"), ("- 24 apples", "-24"), ("", ""), (" ", " "), ("5²", "25"), ("2 x", "2"), ('3 K', '3'),
    ("2 pi", "2"), ("1 3/2", "2.5"), ("1/0", "0"), (r"2\frac{1}{2}", "21/2"), (r"\frac{1}{0}", "0"), ("inf", "1e999"),
    ("twenty", "20"), ("(1,2)", "(2,1)"), ("(0,1)", "[0,1]"), ("{1,2}", "(1,2)"), ('{1,2}', '1,2'), ("no", "yes"),
    ("9" * 801, "9" * 801 + ".0"), ("1e4010", "10e4009"), ('52_7', '52_8'), ("\u0662\u0664", "24"), ('2/pi', '2'),
    ('7 am', '7 pm'), ('44 BC', '44 AD'), ('3 degrees below zero', '3'), ('y=3', 'x=3'), ('5 cents', '$5'),
    ('x=2, y=3', 'x=3, y=2'), ('y=2, x=3', 'x=2,y=3'), ('√3', '3'), ('2√3', '2'), ('\\frac{1}{2}3', '1/23'),
    ('2^{3x}', '2^3 x'), ('x ≤ 3', 'x < 3'), ('x≥3', 'x≤3'), ('x^21', 'x^2 1'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}1&2\\end{pmatrix}'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{vmatrix}1\\\\2\\end{vmatrix}'), ('5, yes', '5, no'),
    ('2*7=15', '14'), ('x\\frac{-1}{2}', 'x-1/2'), ('2^{\\frac12}', '2^1/2'), ('π', '3.14'), ('∞', '-∞'),
    ('-∞', '\\infty'), ('{{1,2}}', '\\{1,2\\}'), ('5 percent', '0.05'), ('ab -1', '-1'), ('n = 5k', '5'),
    ('x=5 or 6', '5'), ('C', 'D'), ('CD', 'C'), ('AB', 'A'), ('(3)(4)', '12'), ('2 sqrt 3', '2'), ('$7M', '7'),
    ('P(A)=0.5', 'P(B)=0.5'), ('x_1=3', 'x_2=3'), ('f(2)=7', 'f(3)=7'), ('\\overline{12}', '12'),
    ('0.\\overline{3}', '0.3'), ('0.333...', '0.333'), ('12...', '12'), ("8, yes", "8"), ("8, four", "8"),
    ("(x,y)=(1,2) or (x,y)=(5,6)", "(5,6)"), ("2*4=8 or 9", "8"),
]


def test_different_answers():
    assert [pair for pair in DIFFERENT if math_equal(*pair)] == []


# The way from the executor's output to the reward: extract, then compare.
ANSWERS = [
    ('So \\boxed{9}. The answer is elegant.', '9'), ('#### 9\nThe answer is fully consistent.', '9'),
    ('#### 18\n#### Explanation\nwe add 3 and 4', '18'),
    ('\\boxed{18}\n\nThe final answer is in \\boxed{} above', '18'), ('#### 6*4 = 24', '24'),
    ('Answer: a+b = 3+4 = 7', '7'), ('Answer: Tom has 7 pens left', '7'), ('The answer is option D.', 'D'),
    ('\\boxed{\\text{The answer is 7}}', '7'), ('Final answer - 24', '24'), ('Answer:\n* 24', '24'),
    ('<think>\\boxed{5} hmm</think>\nSo the total is 6.', '6'), ('The answer is $2\\sqrt{3}$ cm.', '2\\sqrt{3}'),
    ('Thus, the perimeter is $12$.', '12'), ('The answer is: **C**', 'C'), ('The answer is (C).', 'C'),
    ('#### 2*7 = 14 apples', '14'), ('#### $18', '18'), ('The answer is\n\n$$\\frac{3}{4}$$', '3/4'),
    ('So the total cost is $18 + $5 = $23.', '23'), ('She makes 9 * 2 = $<<9*2=18>>18 every day', '18'),
    ('\\boxed{12 \\text{ apples}}', '12'), ('\\boxed{x=12}', '12'), ('\\boxed{\\$12}', '12'),
    ('#### Step 3: Sum up\n5+6=11\nSo 11 apples.', '11'), ('The answer is $\\boxed{\\frac{3}{4}}$.', '0.75'),
    ('\\boxed 8', '8'), ('The answer is in the box: \\boxed{8}', '8'), ('Answer: \\(8\\)', '8'),
    ('Answer: \\[8\\]', '8'), ('Answer: $8$ apples', '8'), ("<answer>\\(\\frac{3}{11}\\)</answer>", "3/11"),
    ("<answer>She has 58 left.</answer>", "58"), ("it is 58<|eot_id|>", "58"), ("The answer is 58</s>", "58"),
    ("**Answer**:\n\n$$\n2\\sqrt{7}\n$$\n", "2\\sqrt7"), ("Hence\n$$\n\\frac{3}{11}\n$$", "3/11"),
    ("The answer is\n\\[ x = 58. \\]", "58"), ("Answer: so they pay 8 * 7.25 = $58 in total", "58"),
    ("#### x = 5,800", "5800"), ("The answer is $N = 1{,}058$.", "1058"), ("The answer is $3\\pi - 58$.", "3\\pi-58"),
    ("\\boxed{58}\n\nNote: the answer would be 60 if he had not paid.", "58"),
]


def test_the_answer_of_a_text():
    assert [pair for pair in ANSWERS if not math_equal(extract_answer(pair[0]), pair[1])] == []


NO_ANSWERS = [
    ('Answer: 7, which is 2 more than 5', '7'), ('The answer is 7 and also 8', '7'), ('Final answer - 24', '-24'),
    ('#### - 24', '24'), ('\\boxed{5}\nLet me check \\boxed{6', '6'), ('so 12. The answer is \\boxed{12', '12'),
    ('<think>the answer is 5', '5'), ('<think>\\boxed{5} hmm</think>\nSo the total is 6.', '5'),
    ('There are 3 million', '3'), ('so y = 3x', '3'), ('= 2^3', '3'), ('it is about 7', '7'),
    ('The area is \\sqrt{16}', '16'), ('Answer: (C) 24', 'C'), ('Thus x = 5 and y = 6.', '6'),
    ('The answers are 5 and 6', '6'), ('the temperature is 5 degrees below zero', '5'),
    ('Answer: 5 degrees below zero', '-5'), ('The answer is unknown.', '5'),
    ('I got 12. Wait, the answer is not 12.', '12'), ('The answer is 12 (not 13).', '12'),
    ('\\boxed{12}\\boxed{13}', '13'), ('The answer is 8!', '8'), ("It is 5 m", "5 km"),
    ("The answer is $8\\pi - 16$.", "8\\pi 16"), ("Answer: n=2 or n=5", "5"), ("\\boxed{x=2 \\text{ or } x=5}", "5"),
    ("Answer: x=2; x=5", "5"), ("Answer: x=2 and x=5", "5"), ("Answer: x=2 x=5", "5"),
    ("\\boxed{58}\n\nNote: the answer would be 60 if he had not paid.", "60"),
    ("First $$58$$ and then\n$$\n60\n$$", "58"), ("<answer>5 or 8</answer>", "8"), ("3 or 4", "4"),
    ("3 apples or 4 apples", "4"), ("so 3, 4", "4"), ("3 4", "4"), ("3 to 4", "4"), ("#### 4 or 3", "4"),
]


def test_not_the_answer_of_a_text():
    assert [pair for pair in NO_ANSWERS if math_equal(extract_answer(pair[0]), pair[1])] == []


@pytest.mark.parametrize("text", [
    "1" * 10**6, "(" * 10**5 + "1" + ")" * 10**5, "{" * 10**5, "}" * 10**5, "\\boxed{" * 10**5 + "}" * 10**5,
    "\\boxed{" * 30_000, "\\boxed{1}" * 20_000, "answer is " * 20_000, "1," * 10**5, "####" * 20_000, "\\text{" * 40_000,
    "-" * 200_000, "answer:\n" * 10_000, "1e" + "9" * 3000, "\ud800 \x00 #### \udfff", "\\frac{" * 30_000, "a " * 1900 + "1",
    "answer" + " " * 200_000, " \n" * 10**5, "\\boxed{" + " " * 10**5 + "}", "9^9^9^9^9", "#### 9e9999999",
    "#### " + "(" * 1900 + "1" + ")" * 1900, "#### " + "1/" * 1900, "#### " + "$" * 3900, "#### " + "," * 3900,
    "#### " + "1 " * 1900, "1 x 10^" + "9" * 3000, "#### 5 " + "a-" * 1900 + "!", "or " * 1300 + "1 2", "\\circ}" * 600,
], ids=lambda text: repr(text[:12]))
def test_hostile_text_is_quick_and_never_raises(text):
    started = time.process_time()
    extract_answer(text)
    assert math_equal(text, "24") is False and math_equal("24", text) is False
    assert math_equal(extract_answer(text), "24") is False
    math_equal(text, text)
    assert time.process_time() - started < 3


PIECES = r"""\boxed{ \fbox{ } { \frac \dfrac \sqrt [ ] ( ) ^ _ 12 3.5 1,234 - #### $ \$ % \text{ apples x = and or , ; <think> </think>
    \begin{pmatrix} \end{pmatrix} \\ & ½ √ π ∞ ³ ⁄ 元 \infty \le \in 1e9 / ** `` ``` ~~~ python \left \right \{ \} ! ° \circ … because
    - {,} € \, dozen 999999999999""".split() + [" ", "\n", "answer is ", "Answer: ", "Step 2:", "\ud800", "\0", "<answer>", "</answer>", "$$", "\\[", "<|im_end|>"]


@pytest.mark.parametrize("count", [200, pytest.param(60_000, marks=pytest.mark.slow)])
def test_fuzzed_texts(count):
    rng = random.Random(count)
    for _ in range(count):
        some = rng.sample(PIECES, rng.choice([3, 8, len(PIECES)]))
        text = rng.choice(PIECES) * rng.choice([0, 0, 0, 0, 0, 0, 0, 300, 5000])
        text += "".join(rng.choices(some, k=rng.choice([3, 8, 20, 60, 400])))
        started = time.process_time()
        answer = extract_answer(text)
        assert math_equal(answer, "24") in (True, False) and math_equal(text, "24") in (True, False)
        extract_code(text)
        assert time.process_time() - started < 1, text[:200]


# ---------------------------------------------------------------- code blocks

COMPLETIONS = [
    ("x = 1", "x = 1"), ("```python\nx = 1\n```", "x = 1"), ("```py\nx = 1\n```\nbye", "x = 1"),
    ("~~~python3\nx = 1\n~~~", "x = 1"), ("```python3\nx = 1\n```", "x = 1"), ("```\na\n```\nor\n```\nb\n```", "b"),
    ("hi\n```python\nx = 1\ny = 2", "x = 1\ny = 2"), ("```\r\nx\r\ny\r\n```\r\n", "x\ny"), ("~~~\n```\n~~~", "```"),
    ("````\n```\n````", "```"), ("x = 1\n```\n", "x = 1"), ("```\na\n```\n```", "a"),
    ("1. so\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"), ("print('```')", "print('```')"), ("", ""),
    ("```python\nx = 1\n```\nOutput:\n```\n17\n```", "x = 1"), ("```python\nx = 1\n```\n```text\ny = 2\n```", "x = 1"),
    ("```py\nx = 1\n```\nRun:\n```sh\npython a.py\n```", "x = 1"), ("```\nx = 1\n```\n```\n[1, 2]\n```", "x = 1"),
    ("```\nx = 1\n```\n```\n$ python a.py\n```", "x = 1"), ("```\nx = 1\n```\n```\n>>> x\n1\n```", "x = 1"),
    ("```python\nx = 1\n```\n**Expected output:**\n```\ny = 2\n```", "x = 1"),
    ("```python\nx = 1\n```\n```markdown\n# y\n```", "x = 1"),
    ("```python\nx = 1\n```\n```\nHello World\n```", "x = 1"), ("```python\nx = 1\n```\n```\n4 5 6\n```", "x = 1"),
    ("```python\nx = 1\n```\n```\nhello\n```", "x = 1"),
    ("```python\nx = 1\n```\n```\n# Notes\n\nsome words here\n```", "x = 1"),
    ("```cpp\nint x;\n```\n```py\nx = 1\n```", "x = 1"), ("```python\nx = 1\n```\n```cpp\nint x;\n```", "x = 1"),
    ("```json\n{}\n```", "{}"), ("```python import sys\nprint(1)\n```", "import sys\nprint(1)"),
    ("```print(1)\n```", "print(1)"), ('```python title="a.py"\nx = 1\n```', "x = 1"),
    ("```{.python .numberLines}\nx = 1\n```", "x = 1"), ("```python\nx = 1```", "x = 1"),
    ("```python\nx = 1\nprint(x)```\nDone.", "x = 1\nprint(x)"), ("```python print(5)```", "print(5)"),
    ("```Python3.11\nx = 1\n```", "x = 1"), ("```main.py\nx = 1\n```\n```\n5\n```", "x = 1"),
    ("```python\ndef f(a):\n    return a\n```\nExample:\n```python\nprint(f(2))\n```", "def f(a):\n    return a"),
    ("```python\ndef f(a):\n    return a\n```\nBetter:\n```python\ndef f(a):\n    return 2 * a\n```", "def f(a):\n    return 2 * a"),
    ('```python\ndef f():\n    """Say\n\n    ```\n    f()\n    ```\n    """\n    return 5\n```', 'def f():\n    """Say\n\n    ```\n    f()\n    ```\n    """\n    return 5'),
    ("```python\nx = 1\n```<|im_end|>", "x = 1"), ("<think>\n```python\nx = 0\n```\n", ""),
    ("<think>\n```python\nx = 0\n```\n</think>\nx = 1", "\nx = 1"),
]


def test_extract_code():
    assert [(text, extract_code(text)) for text, code in COMPLETIONS if extract_code(text) != code] == []


def test_the_block_that_the_tests_ask_for():
    text = "```python\ndef g(x):\n    return x\n```\nthen\n```python\ndef f(x):\n    return 2 * x\n```\nand\n```python\nprint(f(3)\n```"
    blocks = verify.code_blocks(text)
    verdicts = run_programs([blocks] * 2, [[check("assert f(2) == 4")], [check("assert g(2) == 2")]])
    assert len(blocks) == 3 and [v.outcome for v in verdicts] == ["passed", "passed"]
    assert run(["n = int(input())\nprint(n + 1)", "O(n log n)"], io("1", "2")).ok                 # a note is no program
    assert run(["def f(x):\n    return x\nprint(f(int(input())))", "print(f(7))"], io("1", "1")).ok


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


# ---------------------------------------------------------------- honest programs

SUM = "print(sum(map(int, input().split())))"


SUMS = [
    SUM, "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "print(sum(map(int, open(0).read().split())))", "print(sum(map(int, open('/dev/stdin').read().split())))",
    "import os\n" + SUM + "\nimport sys\nsys.stdout.flush()\nos._exit(0)",
    f"if __name__ == '__main__':\n    {SUM}\n    exit()",
    "import sys, threading\nthreading.stack_size(1 << 28)\nsys.setrecursionlimit(10**6)\n" "def f(n): return n and f(n - 1)\ndef main(): f(20000); " + SUM + "\nthreading.Thread(target=main).start()",
    "import sys, functools\nsys.setrecursionlimit(10**5)\n@functools.lru_cache(None)\ndef f(n): return n and f(n - 1)\nf(9000)\n" + SUM,
    "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
    "import os, sys\nsys.stdout = open(os.devnull, 'w')\nsys.stdout.write('x')\nsys.stdout = sys.__stdout__\n" + SUM,
    "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\nopen('a.txt', 'w').write('x')\nopen('a.txt').read()\n" + SUM,
    "import asyncio\nasync def main(): " + SUM + "\nasyncio.run(main())",
    "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p: list(p.map(abs, [1, 2]))\n" + SUM,
    "import sys, os\nfrom io import BytesIO, IOBase\nclass Fast(IOBase):\n    def __init__(self): self.kept = BytesIO(); self.write = lambda t: self.kept.write(t.encode())\n" "    def flush(self): os.write(1, self.kept.getvalue()); self.kept = BytesIO()\nsys.stdout = Fast()\n" + SUM,
    "import os, sys\nclass Bare:\n    text = ''\n    def write(self, t): self.text += t\n    def flush(self): os.write(1, self.text.encode()); self.text = ''\nsys.stdout = Bare()\n" + SUM,
    "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='ascii')\n" + SUM,
    "import io, sys, atexit\nkept = sys.stdout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(kept.getvalue()))\n" + SUM,
    "import threading, time\nx = input()\nthreading.Thread(target=lambda: (time.sleep(.05), print(sum(map(int, x.split()))))).start()",
    "import bz2, lzma, sqlite3, ssl, zlib\n" + SUM,
    "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\n" + SUM,
    "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\n" "print(pickle.loads(pickle.dumps(A(sum(map(int, input().split()))))).n)",
    "\ufeff" + SUM, SUM + "\r\n", "# -*- coding: latin-1 -*-\n" + SUM,
]


def test_honest_stdin_programs():
    together = [io("1 2 3\n", " 6 \n\n"), io("4", "4"), io("5 5\n", "10")]
    verdicts = run_programs(SUMS * 2, [together] * len(SUMS) + [[io("5 5", "10")]] * len(SUMS))
    assert [pair for pair in zip(SUMS * 2, verdicts) if not pair[1].ok] == []


TOKENS = [
    ("3.1622776601683795", "3.16227766", True), ("0.0", "0.00", True), ("1.0000001", "1.0", True),
    ("1.5e-07", "0.00000015", True), ("1.00001", "1.0", False), ("3", "3.0", False), ("10000001", "10000000", False),
    ("-0.0", "0.0", False), ("0.1", "-0.1", False), ("1.2.3", "1.2.30", False), ("nan", "nan", True),
    ("1.0 2.0", "1.0", False), ("[1.0]", "[1.00]", False), ("9" * 300 + ".0", "9" * 299 + "8.0", False),
]


def test_tokens_on_stdout():
    verdicts = run_programs([f"print({said!r})" for said, _, _ in TOKENS], [[io("", right)] for _, right, _ in TOKENS])
    assert [row for row, verdict in zip(TOKENS, verdicts) if verdict.ok != row[2]] == []


def test_several_tests_cost_one_process_when_all_pass(monkeypatch):
    """Whatever else happens, each test gets a process of its own: also where one test spoils the next."""
    runs, real = [], verify._run
    monkeypatch.setattr(verify, "_run", lambda *a: runs.append(1) or real(*a))
    tests = [io("1 2", "3"), io("\ud800é 1", "1"), io("", "0"), io("7 " * 9, "63")]
    body = "import sys\nx = sum(int(n) for n in sys.stdin.buffer.read().split() if n.isdigit())\n"
    assert run(body + "print(x)", *tests).passed == 4 and len(runs) == 1
    for spoils in ("print(x, flush=True)\nimport os\nos._exit(0)", "print(x, flush=True)\nimport os\nos.closerange(0, 20)",
                   "print(x)\nif hasattr(sys, 'seen'): print(9)\nsys.seen = 1",
                   "print(x)\nimport threading, time\nthreading.Thread(target=lambda: time.sleep(0.05)).start()"):
        runs.clear()
        assert run(body + spoils, *tests).passed == 4 and len(runs) > 1, spoils


@pytest.mark.parametrize("program, outcome, passed", [
    ("print(x if x else 1 / 0)", "runtime_error", 3), ("print(x if x else 5)", "failed_test", 3),
    # Right where an earlier test has left something: it still fails; and ends of tests that never were.
    ("n = getattr(sys, 'n', 0)\nsys.n = n + 1\nprint(x if n else -1)", "failed_test", 3),
    ("print(3, end='\\0next\\0')\nprint(1, end='\\0next\\0')\nprint(0, end='\\0next\\0')", "failed_test", 0),
    ("import os\nos.write(1, b'3\\0next\\0001\\0next\\0000\\0next\\0')\nos._exit(1)", "runtime_error", 0),
    ("print(x)\nwhile not x: pass", "timeout", 2),
    # What goes on in a thread counts for its own test, in the last one, too.
    ("import os, threading, time\nprint(x, flush=True)\nif x == 4: threading.Thread(target=lambda: (time.sleep(0.1), os._exit(1))).start()", "runtime_error", 3),
    ("import threading, time\nprint(x)\nif not x: threading.Thread(target=lambda: (time.sleep(0.1), print(9))).start()", "failed_test", 3)])
def test_one_bad_test_of_several(program, outcome, passed):
    body = "import sys\nx = sum(map(int, sys.stdin.read().split()))\n"
    tests = [io("1 2", "3"), io("1", "1")] + [io("", "0")] * (program[-4:] == "pass") + [io("4", "4"), io("", "0")]
    verdict = run(body + program, *tests, timeout=0.3)
    assert (verdict.outcome, verdict.passed, verdict.total) == (outcome, passed, len(tests))


def test_set_order_and_random_numbers_do_not_change_between_runs_and_helpers():
    program = "import random\nprint(*{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}, random.random())"
    order = run(program, io("", "?")).detail
    assert "printed" in order and run(program, io("", "?")).detail == order
    fresh()
    assert run(program, io("", "?")).detail == order


# ---------------------------------------------------------------- outcomes

@pytest.mark.parametrize("program, outcome", [
    ("print(1", "compile_error"), ("x = '\0'", "compile_error"), ("x = '\ud800'", "compile_error"),
    ("(" * 5000 + ")" * 5000, "compile_error"), ("return 1", "compile_error"),
    ("print(2)", "failed_test"), ("", "failed_test"), ("print('1 1')", "failed_test"),
    ("import os; os.write(1, bytes(range(128, 256)))", "failed_test"), ("#" * 10**6 + "\nprint(2)", "failed_test"),
    ("1 / 0", "runtime_error"), ("assert False", "runtime_error"), ("print(1); exit(3)", "runtime_error"),
    ("import sys; print(1); sys.exit('bad')", "runtime_error"), ("print(1); import os; os._exit(1)", "runtime_error"),
    ("def f(n): return f(n + 1)\nf(0)", "runtime_error"), ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "runtime_error"),
    ("import ctypes; ctypes.string_at(0)", "runtime_error"), ("print(1); import os; os.abort()", "runtime_error"),
    ("x = bytearray(3 << 30)", "memory"), ("x = []\nwhile True: x.append(bytes(50 << 20))", "memory"),
    ("raise MemoryError", "memory"),
], ids=lambda value: value[:40])
def test_outcomes(program, outcome):
    stdin_verdict, assert_verdict = run_programs([program, program], [[io("", "1")], [check("assert f(1)")]])
    assert (stdin_verdict.outcome, stdin_verdict.passed, stdin_verdict.total) == (outcome, 0, 1)
    assert stdin_verdict.detail.startswith("test 1 of 1: ")
    if outcome != "failed_test":
        assert assert_verdict.outcome == outcome


def test_asserts_count_separately_and_the_worst_names_the_outcome():
    tests = [check("assert f(0) == 1"), check("assert f(1) == 1"), check("assert f(2)"), check("assert f(1) == 2")]
    verdict = run("def f(x):\n    return [1, 2][x]", *tests)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("runtime_error", 2, 4)
    assert "test 3 of 4" in verdict.detail and "IndexError" in verdict.detail


def test_all_tests_are_run_after_a_failure_but_none_after_a_timeout():
    failing = run("print(7)", io("", "1"), io("", "7"), io("", "2"), io("", "7"))
    assert (failing.outcome, failing.passed, failing.total) == ("failed_test", 2, 4)
    started = time.process_time(), time.monotonic()
    late = run("if input() == 'go':\n    while True: pass\nprint(1)", io("x", "1"), *[io("go", "1")] * 9, timeout=0.3)
    assert (late.outcome, late.passed, late.total) == ("timeout", 1, 10)
    assert time.monotonic() - started[1] < 2.6  # nine time-outs would take 2.7 s of CPU


def test_timeouts():
    programs = ["while True: pass", "import time; time.sleep(60)", "try:\n    while True: pass\nexcept BaseException:\n    print(1)", "9 ** 9 ** 9",
                # Ignoring the signals leaves RLIMIT_CPU, which ends it with SIGKILL: still late, and not out of memory.
                "import signal\nfor s in (signal.SIGPROF, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
                # Right, with a normal end, and the timer switched off, but after more CPU time than it had.
                "import signal, time\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile time.process_time() < 0.5: pass\nprint(1)"]
    assert kinds(*programs, timeout=0.3) == ["timeout"] * 6


def test_sleepers_do_not_hold_the_others():
    """Wall time follows the CPU time that a program uses: one that uses none ends soon."""
    started = time.monotonic()
    sleepers = [f"import time\ntime.sleep(60)  # {i}" for i in range(4)]
    assert kinds(*sleepers, *[f"print(1)  # {i}" for i in range(8)], timeout=0.3, workers=2) == ["timeout"] * 4 + ["passed"] * 8
    assert kinds("import time\ntime.sleep(0.6)\nprint(1)", timeout=0.3) == ["passed"]
    assert time.monotonic() - started < 8


def test_verdicts_do_not_depend_on_the_load():
    """Wall time of the programs is several times their CPU time while six loops share the cores."""
    spin = "import time\nwhile time.process_time() < {}: pass\nprint(1)"
    load = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(6)]
    try:
        verdicts = run_programs([spin.format(0.25), spin.format(9)] * 2, [[io("", "1")]] * 4, timeout=0.6, workers=2)
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert [v.outcome for v in verdicts] == ["passed", "timeout"] * 2


def test_what_expects_nothing_does_not_count():
    assert run("", io("", ""), io("1", " \n"), check("  ")) == Verdict("no_tests", 0, 0, "")
    assert run("").outcome == "no_tests"
    assert run("print(1)", io("", ""), io("", "1")) == Verdict("passed", 1, 1, "")
    assert run("def f(): pass", check("assert True, 'it prints this'"), check("def check(c):\n    assert c() == 1")).outcome == "no_tests"


# ---------------------------------------------------------------- attacks on the verdict

TESTS = [check("assert f(1) == 2"), check("assert f(2) == 3")]


# An early end, objects that agree with everything, a patched interpreter, forged markers, values that are too much.
FORGED = [
    "import os; os._exit(0)", "import sys; sys.exit(0)", "exit()", "raise SystemExit", "def f(x): exit()",
    "import os\ndef f(x): os._exit(0)", "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "import threading, os\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f(x):\n    while 1: pass",
    "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return A(0)",
    "class A(str):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "import builtins\nbuiltins.exec = lambda *a: None\ndef f(x): return 0",
    "import json\njson.dumps = lambda *a, **k: '[\"passed\", \"\"]'\ndef f(x): return 0",
    "import os\nold = os.write\nos.write = lambda fd, data: old(fd, data.replace(b'failed_test', b'passed'))\ndef f(x): return 0",
    "import sys\nfor m in list(sys.modules.values()):\n    for n in ('_encode', '_decode', '_answer'):\n" "        if hasattr(m, n): setattr(m, n, lambda *a: ['value', 2])\ndef f(x): return 0",
    "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'[\"passed\", \"\"]\\n' * 9)\n    except OSError: pass\ndef f(x): return 0",
    "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'{\"code\": 0, \"cpu\": 0, \"late\": false, \"judged\": 0}')\n" "    except OSError: pass\nos._exit(0)",
    "import os\nos.write(3, b'[\"function\"]\\n' + b'[\"value\", true]\\n' * 9)\nwhile True: pass",
    "import os\nos.write(3, b'[\"value\", {\"evil\": 1}]\\n' * 9)\ndef f(x): return 0",
    "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
]


def test_forged_passes():
    verdicts = run_programs(FORGED, [TESTS] * len(FORGED), timeout=0.7)
    assert [pair for pair in zip(FORGED, verdicts) if pair[1].ok or (pair[1].passed, pair[1].total) != (0, 2)] == []


@pytest.mark.parametrize("program", [
    "def f(x): return 0\ndef LIMIT(): pass",                       # a function where the test wants a value to pass on
    "def f(x): return 10 ** 9999\nLIMIT = 1",                       # too long for decimal text in the message
    "def f(x): raise ValueError('\U0001F600' * 10**6)\nLIMIT = 1",  # a message of megabytes
    "import os\nos.write(3, b'[\"function\"]\\n[\"value\", 1]\\n[\"error\", \"E\", \"' + b'x' * 3000000 + b'\"]\\n' * 3)\nwhile True: pass",
    "import os\nos.write(3, b'[\"error\", 1, [2]]\\n' * 9)\nwhile True: pass", "import os\nos.write(3, b'7\\n[]\\n' * 9)\nwhile True: pass",
])
def test_no_reply_of_a_program_raises_in_the_trainer(program):
    """Each also must not cost the assert that follows its chance: the judge goes on."""
    verdict = run(program, check("assert f(LIMIT) == 1"), check("assert f(LIMIT) == '\U0001F600' * 100"), timeout=0.5)
    assert not verdict.ok and verdict.passed == 0 and verdict.detail.isascii() and len(verdict.detail) <= 500


def test_a_right_program_that_exits_early_has_not_passed():
    verdict = run("def f(x): return x + 1\nexit()", *TESTS)
    assert (verdict.outcome, verdict.passed) == ("runtime_error", 0) and "SystemExit" in verdict.detail
    verdict = run("import os\ndef f(x): return 2 if x == 1 else os._exit(0)", *TESTS)
    assert (verdict.outcome, verdict.passed) == ("runtime_error", 1)


STACK = "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
NODE = "class Node:\n    def __init__(self, val, next=None): self.val, self.next = val, next\n"


HONEST = [
    ("def f(x): return x + 1", "assert f(1) == 2"),
    ("def f(x): return x > 0", "assert f(1) is True and not f(-1) and f(2)"),
    ("def f(x): return x / 3", "assert abs(f(1) - 1 / 3) < 1e-6"),
    ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 1 / 3)"),
    ("def f(x): return (1, 'a', None, 2.5, b'x', {1: [2]}, {3}, frozenset([4]), 1j, True)", "assert f(0) == (1, 'a', None, 2.5, b'x', {1: [2]}, {3}, frozenset([4]), 1j, True)"),
    ("def f(x, y=0): return x - y", "assert f(y=1, x=2) == 1 and f(*[5], **{'y': 1}) == 4"),
    ("def f(x): return 10 ** x", "assert f(5000) == 10 ** 5000"),
    ("def f(x): return float('inf') if x else float('nan')", "assert f(1) == float('inf') and f(0) != f(0)"),
    ("def f(x): return '\\ud800\\x00'", "assert f(0) == '\\ud800\\x00'"),
    ("from collections import Counter, OrderedDict, defaultdict, namedtuple\nP = namedtuple('P', 'a b')\n" "def f(x): return [Counter(x), OrderedDict(a=1), defaultdict(int, b=2), P(1, 2)]", "assert f('aab') == [{'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, (1, 2)]"),
    ("def f(x): return map(str, range(x))", "assert list(f(3)) == ['0', '1', '2']"),
    ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    ("LIMIT = 5\nif __name__ == '__main__': LIMIT = int(input())", "assert LIMIT == 5"),
    ("def f(x):\n    if x < 0: raise ValueError('no')", "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"),
    ("def f(x):\n    x.append(1)\n    return x", "assert f([0]) == [0, 1]"),
    ("import sys\ndef f(x):\n    for _ in range(300): print('debug ' * 10**4)\n    sys.stderr.write('noise')\n    return sys.stdin.read()", "assert f(1) == ''"),
    ("class Solution:\n    def f(self, s): heapq.heapify(s); return [s[0], math.gcd(4, 6), deque(s), Counter(s)[3]]", "from collections import deque\nassert Solution().f([3]) == [3, 2, deque([3]), 1]"),
    ("def f(s): return str(int(s) + 1)", "assert f('9' * 4999) == '1' + '0' * 4999"),
    ("def f(x, kind): return [v for v in x if type(v) is kind]", "assert f((4, 7.7, 'a'), int) == [4] and f([2.5], float) == [2.5]"),
    ("def f(g, *a): return g(*a)", "assert f(max, [1, 3]) == 3 and f(operator.add, 2, 3) == 5 and f(math.sqrt, 9) == 3"),
    ("def f(x): return list(x)", "assert f(range(3)) == [0, 1, 2]"),
    ("def primes():\n    n = 1\n    while True:\n        n += 1\n        if all(n % d for d in range(2, n)): yield n", "g = primes()\nassert [next(g) for _ in range(5)] == [2, 3, 5, 7, 11]"),
    ("seen = []\ndef f():\n    for i in range(9):\n        seen.append(i)\n        yield i", "g = f(); assert next(g) == 0 and seen == [0]"),
    ("def f():\n    yield 1\n    raise KeyError('x')", "g = f()\nassert next(g) == 1\ntry:\n    next(g)\n    assert False\nexcept KeyError:\n    pass"),
    ("import re\ndef f(s): return re.match('a(b)', s)", "assert f('ab').group(1) == 'b' and f('x') is None"),
    ("def f(): return range(3)", "assert f() == range(3) and list(f()) == [0, 1, 2]"),
    ("class Solution:\n    def twoSum(self, nums: List[int], target: int) -> Optional[List[int]]:\n        return [0, 1]", "assert Solution().twoSum([2, 7], 9) == [0, 1]"),
    (STACK, "s = Stack(); s.push(3); s.push(4); assert s.pop() == 4 and s.pop() == 3"),
    (STACK, "s = Stack()\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass"),
    ("class S:\n    def __init__(self): self.a = []\n    def __len__(self): return len(self.a)\n    def add(self, x): self.a.append(x)", "s = S(); s.add(1); assert len(s) == 1 and s.a[0] == 1"),
    ("class V:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'V({self.x})'", "v = V(3); assert v.x == 3 and repr(v) == 'V(3)' and str(v) == 'V(3)'"),
    ("class Set:\n    def __init__(self): self.kept = []\n    def add(self, x): self.kept.append(x)\n    @classmethod\n    def of(cls, *a):\n        s = cls()\n        s.kept += a\n        return s", "s = Set.of(1, 2)\ns.add(3)\nassert s.kept == [1, 2, 3]"),
    ("class P:\n    def __init__(self): self._x = 1\n    @property\n    def x(self): return self._x\n    @x.setter\n    def x(self, v):\n        if v < 0: raise ValueError\n        self._x = v", "p = P()\np.x = 5\nassert p.x == 5\ntry:\n    p.x = -1\n    assert False\nexcept ValueError:\n    pass"),
    ("class Book:\n    def __init__(self): self.title, self.count = 'T', 3\ndef find(): return Book()", "assert find().title == 'T' and find().count == 3"),
    ("class M:\n    def __enter__(self): return 6\n    def __exit__(self, *a): return False\ndef f(x): return M()", "with f(1) as y:\n    assert y == 6"),
    ("class G:\n    def __getitem__(self, i): return i * 2\n    def __iter__(self): return iter([1, 2])", "g = G(); assert g[3] == 6 and list(g) == [1, 2] and 2 in g"),
    (NODE + "def rev(n):\n    p = None\n    while n: n.next, p, n = p, n, n.next\n    return p", "n = rev(Node(1, Node(2, Node(3))))\nout = []\nwhile n:\n    out.append(n.val)\n    n = n.next\nassert out == [3, 2, 1]"),
    (NODE, "a = Node(1)\na.next = Node(2)\na.val = 7\nassert a.val == 7 and a.next.val == 2 and a.next.next is None"),
    ("class M:\n    def __enter__(self): return 5\n    def __exit__(self, *a): return None", "with M() as x:\n    assert x == 5"),
    ("class It:\n    def __init__(self): self.n = 0\n    def __iter__(self): return self\n    def __next__(self):\n        self.n += 1\n        if self.n > 3: raise StopIteration\n        return self.n", "assert list(It()) == [1, 2, 3]"),
    ("def add(n):\n    def inner(x): return x + n\n    return inner", "assert add(2)(3) == 5"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\ndef f(): return [P(1), P(3)]", "assert [(p.x, p.y) for p in f()] == [(1, 2), (3, 2)]"),
    ("def f(x): x.sort()", "x = [2, 1]; f(x); assert x == [1, 2]"),
    ("def f(x): x[0].append(1); x.clear() if len(x) > 3 else None", "x = [[], 2]; f(x); assert x == [[1], 2]"),
    ("from decimal import Decimal\ndef f(x): return Decimal(x) / 4", "assert f(10) == 2.5 and f(1) == __import__('decimal').Decimal('0.25')"),
    ("from fractions import Fraction\ndef f(x): return Fraction(x, 6)", "from fractions import Fraction\nassert f(3) == Fraction(1, 2) and f(6) == 1"),
    ("import datetime as d\ndef f(x): return [d.date(2020, 1, x), d.datetime(2020, 1, 2, 3, 4, 5, 6), d.timedelta(days=x), d.time(4)]", "import datetime as d\nassert f(2) == [d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3, 4, 5, 6), d.timedelta(2), d.time(4)]"),
    ("def f(x): return '[1, (2, -3.5)]'", "import ast\nassert eval(f(1)) == [1, (2, -3.5)] and ast.literal_eval(f(1)) == [1, (2, -3.5)]"),
    ("def f(x): return '2 * 5 * (3 - 1)'", "assert eval(f(1)) == 20"),
]


def test_honest_assert_programs():
    verdicts = run_programs([program for program, _ in HONEST], [[check(statement)] for _, statement in HONEST])
    assert [pair for pair in zip(HONEST, verdicts) if pair[1] != Verdict("passed", 1, 1, "")] == []


AGREES = ("class A:\n    def __getattr__(self, name): return lambda *a: True\n"
          + "".join(f"    def __{n}__(self, *a): return 0\n" for n in "sub rsub add radd abs round lt gt".split())
          + "    def __float__(self): return 5.0\n    def __int__(self): return 5\n    def __len__(self): return 1\n"
          "    def __getitem__(self, i): return 5\n    def __str__(self): return '5'\n")
SPY = "seen = []\nclass Spy:\n    def __sub__(self, other): seen.append(other); return 0\n    __contains__ = __rsub__ = __eq__ = __sub__\n"
ANY = "class Any:\n    def __eq__(self, o): return True\n    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda self, o: True\n    __hash__ = lambda self: 1\n"


# Operators and methods of an object that is no data are not asked, and nothing of the test reaches it.
LIES = [
    ("def abs(x): return 0\ndef f(x): return 9", "assert abs(f(1) - 1.5) < 1e-6"),
    ("class math:\n    isclose = lambda *a: True\ndef f(x): return 9", "assert math.isclose(f(1), 1.5)"),
    ("def set(x): return 0\ndef f(x): return [9]", "assert set(f(1)) == set([1])"),
    ("def check(c): pass\ndef f(x): return 9", "def check(c):\n    assert c(1) == 1\ncheck(f)"),
    ("f = 2", "assert f(1) == 2"), ("def f(x): return 10 ** 9", "assert 2 ** f(1) == 2"),
    ("def f(x): return 10 ** 18", "assert list(range(f(1))) == [1]"),
    (AGREES + "def f(x): return A()", "assert abs(f(1) - 9.5) < 1e-6"),
    (AGREES + "def f(x): return A()", "assert 9.5 - f(1) == 0"),
    (AGREES + "def f(x): return A()", "assert f(1) + 1 == 6"),
    (AGREES + "def f(x): return A()", "assert float(f(1)) == 5 or int(f(1)) == 5"),
    (AGREES + "def f(x): return A()", "assert math.isclose(f(1), 5, rel_tol=1e-06)"),
    (AGREES + "def f(x): return A()", "assert round(f(1), 2) == 5"),
    (AGREES + "def f(x): return A()", "assert f(1).startswith('x')"),
    (AGREES + "def f(x): return A()", "assert f(1).issubset({5})"),
    (AGREES + "def f(x): return A()", "assert f(1).count(5) == True"),
    (AGREES + "def f(x): return A()", "assert len(f(1)) == 1"),
    (AGREES + "def f(x): return A()", "assert f(1)[0] == 5"),
    (AGREES + "def f(x): return A()", "assert str(f(1)) == '5'"),
    (AGREES + "class S:\n    def f(self, x): return A()", "assert S().f(1).endswith('x')"),
    (AGREES + "f = A()", "assert f.keys()"),
    (SPY + "def f(x): return seen[-1] if seen else Spy()", "try:\n    f(1) - 7.25\nexcept TypeError:\n    pass\nassert f(1) == 7.25"),
    (SPY + "def f(x): return seen[-1] if seen else Spy()", "try:\n    7.25 in f(1)\nexcept TypeError:\n    pass\nassert f(1) == 7.25"),
    ("class M:\n    def __enter__(self): return 2\n    def __exit__(self, *a): return True\ndef f(x): return M()", "with f(1) as y:\n    assert y == 3"),
    ("class Open:\n    def __enter__(self): return 2\n    def __exit__(self, *a): return True", "with Open() as y:\n    assert y == 3"),
    ("import os\ndef f(x): os.write(3, b'[\"value\", {\"known\": [\"os\", \"_exit\"]}, []]\\n' * 9)", "assert f(1)(0) == 5"),
    ("def f(x): return exec", "assert f(1)('1') == 5"), ("def f(g): return 5", "assert f(type('T', (), {})()) == 5"),
    (ANY + "def f(x): return Any()", "assert f(1) == 5"), (ANY + "def f(x): return Any()", "assert 5 == f(1)"),
    (ANY + "def f(x): return [Any()]", "assert f(1) == [5]"),
    (ANY + "def f(x): return {1: Any()}", "assert f(1) == {1: 5}"),
    ("class A:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return A()", "assert f(1) == 5"),
    ("class A(list):\n    def __eq__(self, o): return True\n    def __len__(self): return 1\ndef f(x): return A()", "assert f(1) == [5]"),
    ("class A:\n    def __getattr__(self, n): return self\n    def __call__(self, *a): return self\ndef f(x): return A()", "assert f(1).value() == 5"),
    ("class Stack:\n    def push(self, x): pass\n    def pop(self):\n        while True: pass", "s = Stack(); s.push(3); assert s.pop() == 3"),
    ("def f(x): x[:] = range(10 ** 7)", "x = []; f(x); assert x == [1]"),
    ("def f(x): x.append(type('A', (), {'__eq__': lambda *a: True})())", "x = []; f(x); assert x == [1]"),
    ("class A: pass\ndef f(x): return [A() for _ in range(10 ** 6)]", "assert f(1) == [5]"),
    ("import os\ndef f(x): os.write(3, b'[\"value\", {\"object\": 1}, [[1, 2]]]\\n' * 9)", "x = [2, 1]; f(x); assert x == [1, 2] and f(3) == 5"),
    ("import decimal\nclass D(decimal.Decimal):\n    def __eq__(self, o): return True\ndef f(x): return D(3)", "assert f(1) == 5"),
    ("def f(x): return '__import__(\"os\")._exit(0)'", "assert eval(f(1)) == 5"),
    ("def f(x): return '[c for c in (5,)][0]'", "assert eval(f(1)) == 5"),
    ("def f(x): return '9 ** 9 ** 9'", "assert eval(f(1)) == 5"),
    ("def f(x): return '\"a\" * 10 ** 9'", "assert eval(f(1)) == 5"),
]


def test_objects_that_lie_and_values_that_are_code():
    verdicts = run_programs([program for program, _ in LIES], [[check(statement)] for _, statement in LIES], timeout=0.5)
    assert [pair for pair in zip(LIES, verdicts) if pair[1].passed or pair[1].outcome in ("passed", "no_tests")] == []


@pytest.mark.parametrize("statement, said", [
    ("f(1) == 1", "no assert"), ("assert exec(f(1)) is None", "exec"), ("assert compile(f(1), '', 'eval')", "compile"),
    ("e = exec\nassert e(f(1)) is None", "exec"), ("import pickle\nassert pickle.loads(f(1)) == 1", "pickle"),
    ("from marshal import loads\nassert loads(f(1)) == 1", "marshal"), ("import numpy\nassert f(1) == 1", "numpy.*standard library"),
    ("assert f(lambda x: x) == 5", "lambda to f"), ("assert f(1) ==", "judged"), ("assert (", "judged"), ("assert " + "(" * 10**5, "judged"),
])
def test_tests_that_are_refused_when_a_problem_enters(statement, said):
    with pytest.raises(ValueError, match=rf"tests\[1\]\['assert'\].*{said}"):
        verify.check_tests([io("1", "2"), check(statement)])
    with pytest.raises(ValueError, match=r"tests\[0\]\[1\]\['assert'\]"):
        run("def f(x): return 1", io("1", "2"), check(statement))


@pytest.mark.parametrize("test", ["a", {}, {"input": ""}, {"output": ""}, {"input": 1, "output": ""}, {"input": "", "output": None},
                                  {"assert": 1}, {"assert": "", "input": ""}])
def test_bad_tests_are_named(test):
    with pytest.raises(ValueError, match=r"^tests\[0\]\[1\] must have"):
        run_programs(["x"], [[io("", "1"), test]])


def test_tests_that_are_not_refused():
    verify.check_tests([check("assert sorted(f(1), key=lambda x: -x) == [1]"), check("def check(g):\n    assert g() == 1\ncheck(lambda: f(2))")])
    verify.check_tests([io("1", "2"), check(""), check("import re\nassert re.compile('a+').match(f(1))"),
                        check("class T:\n    def go(self):\n        assert f(1) == 1\nT().go()")])
    with pytest.raises(ValueError, match="^tests must be a list"):
        verify.check_tests(None)
    with pytest.raises(ValueError):
        run_programs(["x"], [])


def test_no_secret_in_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    assert run("import os; print('hunter2' in str(os.environ))", io("", "False")).ok


@pytest.mark.parametrize("where", [
    "import sys\nframe = sys._getframe()\nwhile frame:\n    seen += repr(frame.f_locals) + repr(frame.f_globals)\n    frame = frame.f_back",
    "import gc\nseen += repr([o for o in gc.get_objects() if type(o) in (dict, list, tuple)])",
    "import os\nfor fd in range(64):\n    try: seen += os.pread(fd, 99999, 0).decode('latin1')\n    except OSError: pass",
    "import os\nfor top in ('.', '/dev/shm', '/proc/self/fd', '/proc/1/fd'):\n    for d, _, fs in os.walk(top):\n        for f in fs:\n"
    "            try: seen += open(os.path.join(d, f)).read(99999)\n            except (OSError, ValueError): pass",
    "import re\ntry:\n    with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb') as mem:\n        for line in maps:\n"
    "            a, b = (int(n, 16) for n in line.split()[0].split('-'))\n            if 'rw' in line:\n"
    "                mem.seek(a)\n                seen += mem.read(b - a).decode('latin1')\nexcept OSError: pass",
    "import ctypes, gc\nfor o in gc.get_objects():\n    try: seen += ctypes.string_at(id(o), 64).decode('latin1')\n    except Exception: pass",
], ids=["frames", "objects", "descriptors", "files", "own memory", "heap"])
def test_expected_outputs_are_nowhere_in_the_child(where):
    """Looked for twice, for a helper must not have kept them either; without Landlock, which hides /proc anyway."""
    secret = f"sesame{time.monotonic_ns()}"
    look = (f"import re\nseen = ''\n{where}\nfound = re.search('[s]{secret[1:]}', seen)\ndef f(): return bool(found)\n"
            "print(found.group() if found else 'nothing')")  # the pattern is not what it looks for
    with without("landlock"):
        for _ in range(2):
            verdicts = run_programs([look, look], [[io("", secret), io("", "nothing")], [check(f"assert f() is False, {secret!r}")]],
                                    workers=1, timeout=5)
            assert [v.passed for v in verdicts] == [1, 1], verdicts


@pytest.mark.parametrize("program, outcome", [
    ("while True: print('x' * 100000)", "runtime_error"),
    ("import os\nwhile True: os.write(1, b'x' * 1000000)", "runtime_error"),
    ("import os\nos.ftruncate(1, 1 << 40)", "runtime_error"),
    ("import os\nwhile True: os.write(2, b'x' * 1000000)", "runtime_error"),
    ("print('x ' * 1000000)", "failed_test"),
    ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 1000000)", "runtime_error"),
    ("for i in range(99):\n  with open(str(i), 'wb') as f: f.write(b'x' * 15000000)", "runtime_error"),
    ("fs = [open('/dev/null') for i in range(1000)]", "runtime_error"),
    ("import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "runtime_error"),
])
def test_floods(program, outcome):
    verdict = run(program, io("", "1"), timeout=0.8)
    assert verdict.outcome == outcome and len(verdict.detail) < 500


# ---------------------------------------------------------------- attacks on the machine, and the walls one by one

def fresh():
    """Ends the helpers of this process."""
    for helper in verify._idle.pop(os.getpid(), []):
        helper.close()


@contextlib.contextmanager
def without(*walls):
    """The sandbox without these walls."""
    fresh()
    verify._without.update(walls)
    try:
        yield
    finally:
        verify._without.clear()
        fresh()


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """Everything that the attacks aim at, all of it throw-away: a process with a secret, a folder, sockets."""
    folder = tmp_path_factory.mktemp("victim")
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; x = 'open ' + 'sesame'; print(id(x), flush=True); time.sleep(600)"],
                               env={"SECRET": "sesame"}, stdout=subprocess.PIPE, text=True)
    address = int(process.stdout.readline())
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(str(folder / "stream"))
    unix.listen()
    yield {"PID": process.pid, "ADDRESS": address, "FOLDER": str(folder), "TCP": tcp.getsockname()[1]}
    process.kill()
    process.wait()
    process.stdout.close()
    for end in (tcp, unix):
        end.close()


CTYPES = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef ok(value):\n    if value < 0: raise OSError(ctypes.get_errno())\n"
ATTACKS = [  # what it tries, and the code: it raises when refused
    ("ask whether a signal would reach the victim", "os.kill(PID, 0)"),
    ("signal everything (signal 0, the same check)", "os.kill(-1, 0)"),
    ("a pidfd of it", "os.pidfd_open(PID)"),
    ("SIGIO to it through F_SETOWN", "fcntl.fcntl(0, fcntl.F_SETOWN, PID)"),
    ("ptrace it (PTRACE_SEIZE, which does not stop it)", CTYPES + "ok(libc.ptrace(0x4206, PID, 0, 0))"),
    ("its memory by process_vm_readv", CTYPES +
     "import struct\nb = ctypes.create_string_buffer(8)\nok(libc.process_vm_readv(PID, struct.pack('PN', ctypes.addressof(b), 8), 1, struct.pack('PN', ADDRESS, 8), 1, 0))"),
    ("its environment in /proc", "assert b'sesame' in open('/proc/PID/environ', 'rb').read()"),
    ("its memory in /proc", "f = open('/proc/PID/mem', 'rb', 0); f.seek(ADDRESS); f.read(8)"),
    ("its descriptors in /proc", "os.listdir('/proc/PID/fd')"),
    ("read a file", "open('FOLDER/file').read()"),
    ("overwrite a file", "open('FOLDER/file', 'w').write('x')"),
    ("make a file", "open('FOLDER/new', 'w').write('x')"),
    ("delete a file", "os.unlink('FOLDER/file')"),
    ("truncate a file", "os.truncate('FOLDER/file', 0)"),
    ("make a folder", "os.mkdir('FOLDER/folder')"),
    ("make a link", "os.symlink('FOLDER/file', 'FOLDER/link')"),
    ("chmod a file", "os.chmod('FOLDER/file', 0)"),
    ("give a file away", "os.chown('FOLDER/file', 12345, -1)"),
    ("connect to a loopback port", "socket.create_connection(('127.0.0.1', TCP), 2)"),
    ("listen", "socket.create_server(('127.0.0.1', 0))"),
    ("connect to a unix socket", "socket.socket(socket.AF_UNIX).connect('FOLDER/stream')"),
    ("fork", "os.fork() or os._exit(0)"),
    ("exec", "os.execv('/bin/sh', ['sh', '-c', 'echo harm'])"),
    ("a memfd", "os.memfd_create('x')"),
    ("a new user namespace", CTYPES + "ok(libc.unshare(0x10000000))"),
    ("new rights", CTYPES + "assert libc.prctl(39, 0, 0, 0, 0) == 0"),
]
PRELUDE = "import os, signal, socket, time\ntry: import fcntl, resource\nexcept ImportError: pass\n"


def attack(code, victim):
    """What became of it: 'harm', 'refused', or the verdict when neither was printed."""
    path = Path(victim["FOLDER"], "file")
    for other in ("new", "other", "link", "hard", "folder"):
        leftover = path.with_name(other)
        leftover.rmdir() if leftover.is_dir() else leftover.unlink(missing_ok=True)
    path.write_text("sesame")
    path.chmod(0o600)
    for name, value in victim.items():
        code = code.replace(name, str(value))
    setup, last = (CTYPES, code.removeprefix(CTYPES)) if code.startswith(CTYPES) else ("", code)
    last = last.replace("\n", "\n    ")
    program = f"{PRELUDE}{setup}try:\n    {last}\n    print('harm')\nexcept (OSError, AssertionError, ValueError): print('refused')"
    verdict = run(program, io("", "refused"), timeout=1)
    return "refused" if verdict.ok else "harm" if "printed b'harm" in verdict.detail else verdict


@pytest.mark.parametrize("missing", [(), ("namespaces",), ("landlock",), ("landlock", "namespaces")],
                         ids=["all walls", "Docker", "no Landlock", "gVisor"])
def test_every_attack_is_refused(victim, missing):
    """Without Landlock what only reads comes through, and nothing else."""
    with without(*missing):
        came_through = {name for name, code in ATTACKS if attack(code, victim) != "refused"}
    readable = {"read a file", "list a folder", "its environment in /proc", "its memory in /proc", "its descriptors in /proc",
                "its command line in /proc"}
    assert came_through <= (readable if "landlock" in missing else set())


@pytest.mark.parametrize("wall, name", [("seccomp", "fork"), ("seccomp", "listen"), ("landlock", "read a file")])
def test_each_wall_is_needed(victim, wall, name):
    """Without it one of the attacks comes through; that of rlimits are the floods."""
    code = dict(ATTACKS)[name]
    with without(wall):
        assert attack(code, victim) == "harm"


def test_the_attacks_work_without_walls(victim):
    """Else the tests above would prove nothing. Some need rights of root, which a child has lost."""
    with without("seccomp", "landlock", "namespaces"):
        harmful = [name for name, code in ATTACKS if attack(code, victim) == "harm"]
    assert len(harmful) > 18


@pytest.mark.parametrize("missing", [("landlock",), ("landlock", "namespaces"), ("namespaces",)])
def test_honest_programs_run_on_every_kernel(missing):
    with without(*missing):
        programs = [SUM, "import heapq, bz2, ssl\n" + SUM, "import threading\nthreading.Thread(target=lambda: " + SUM + ").start()",
                    "print(sum(map(int, open(0).read().split())))"]
        verdicts = run_programs(programs, [[io("1 2", "3"), io("4 5", "9")]] * 4)
        verdicts.append(run("def f(x): return [x]", check("assert f({1}) == [{1}]")))
    assert [v.outcome for v in verdicts] == ["passed"] * 5


def test_the_tables_of_system_calls_fit_their_machines():
    """Each call has a number for both; the C library cannot start without these."""
    rows = [row.partition(":")[0].split() for row in (verify._CALLS + verify._WRITING).split(",")]
    assert all(len(row) == 3 for row in rows) and len({row[0] for row in rows}) == len(rows)
    for column in (1, 2):
        numbers = [row[column] for row in rows if row[column] != "-"]
        assert len(set(numbers)) == len(numbers) and all(number.isdigit() for number in numbers)
    arm = {row[0] for row in rows if row[2] != "-"}
    assert {"openat", "read", "write", "mmap", "munmap", "brk", "futex", "exit_group", "clone", "ppoll", "pselect6", "newfstatat"} <= arm


def test_no_file_stays():
    assert run("open('/dev/shm/left', 'w').write('x')\nprint(1)", io("", "1")).ok
    assert not Path("/dev/shm/left").exists() and run("import os\nprint(os.listdir('/dev/shm'))", io("", "[]")).ok
    deep = "import os\nfor i in range(45):\n    os.mkdir('d')\n    os.chdir('d')\nprint(1)"
    assert run(deep, io("", "1")).ok and run("import os\nprint(os.listdir('/dev/shm'))", io("", "[]")).ok


def test_fail_fast_ends_at_the_first_failure(monkeypatch):
    runs, real = [], verify._run
    monkeypatch.setattr(verify, "_run", lambda *a: runs.append(1) or real(*a))
    tests = [io("1", "2"), io("2", "3"), io("3", "4"), check("assert f(1) == 2"), check("assert f(2) == 3")]
    body = "def f(x): return {}\nif __name__ == '__main__': print({})"
    for program, outcome, cost in (
            (body.format("x + 1", "int(input()) + 1"), "passed", 2), (body.format("x + 1", "int(input())"), "failed_test", 1),
            (body.format("x + 1", "1 / 0"), "runtime_error", 2), (body.format("2", "int(input()) + 1"), "failed_test", 2)):
        runs.clear()
        assert run(program, *tests, fail_fast=True).outcome == outcome and len(runs) == cost, program


def test_the_attacks_left_no_trace(victim):
    """After all of them the victim still runs, and its state is not 'stopped'."""
    state = Path(f"/proc/{victim['PID']}/stat").read_text().rpartition(")")[2].split()[0]
    assert state == "S"


# ---------------------------------------------------------------- the machinery

PREAMBLE = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport os, signal, time, verify\nT = [{{'input': '', 'output': '1'}}]\n"
            "def go(*p, **o): return [v.outcome for v in verify.run_programs(p, [T] * len(p), **o)]\n")


def python(code, **options):
    """Runs code in an interpreter of its own that has imported verify; returns its stdout lines."""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def children(pid):
    """Processes that this one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def gone(pids, seconds=5):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_order_duplicates_and_workers():
    programs = [f"print({i % 7})" for i in range(30)]
    tests = [[io("", str(i % 5))] for i in range(30)]
    for workers in (None, 1, 3):
        assert [v.ok for v in run_programs(programs, tests, workers=workers)] == [i % 7 == i % 5 for i in range(30)]
    assert run_programs([], []) == []


def test_equal_jobs_run_once(monkeypatch):
    seen = []
    original = verify._judge
    monkeypatch.setattr(verify, "_judge", lambda *job: seen.append(job) or original(*job))
    verdicts = run_programs(["print(1)"] * 5 + ["print(2)"], [[io("", "1")]] * 4 + [[io("", "2")]] * 2)
    assert [v.ok for v in verdicts] == [True] * 4 + [False, True]
    assert len(seen) == 3


def test_several_threads_at_once():
    results = {}

    def work(n):
        for _ in range(3):
            results.setdefault(n, []).extend(run_programs([f"print({n})", "print('x')", f"def f(): return {n}"],
                                                          [[io("", str(n))]] * 2 + [[check(f"assert f() == {n}")]]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([v.ok for v in results[n]] == [True, False, True] * 3 for n in range(4))


def killer(victims, rng, stop, killed):
    """Kills one of the victims now and then."""
    while not stop.wait(rng.uniform(0.05, 0.4)):
        with contextlib.suppress(OSError, IndexError):
            os.kill(rng.choice(victims()), 9)
            killed.append(1)


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_helpers_killed_at_random(count):
    """Every verdict is right, and nothing is left behind, neither of helpers nor of what they ran."""
    fresh()
    before, stop, killed = set(children(os.getpid())), threading.Event(), []
    thread = threading.Thread(target=killer, args=(lambda: list(set(children(os.getpid())) - before), random.Random(count), stop, killed))
    thread.start()
    try:
        programs = [f"x = int(input())\nprint(x + {i % 3})  # {i}" for i in range(count)]
        programs += [f"import time\ntime.sleep(0.02)\ndef f(x): return x + {i % 3}  # {i}" for i in range(count)]
        tests = [[io("1", "2"), io("2", "3")]] * count + [[check("assert f(1) == 2")]] * count
        verdicts = run_programs(programs, tests, workers=2)
    finally:
        stop.set()
        thread.join()
    assert [v.ok for v in verdicts] == [i % 3 == 1 for i in range(count)] * 2
    helpers = [helper.process.pid for helper in verify._idle[os.getpid()]]
    grandchildren = [pid for helper in helpers for pid in children(helper)]
    fresh()
    assert killed and not grandchildren and gone(helpers)


def test_judges_and_programs_killed_at_random_never_raise_and_never_pass_a_wrong_program():
    fresh()
    stop, killed = threading.Event(), []
    def victims():
        return [pid for helper in children(os.getpid()) for pid in children(helper)]
    thread = threading.Thread(target=killer, args=(victims, random.Random(1), stop, killed))
    thread.start()
    try:
        programs = [f"import time\ndef f(x):\n    time.sleep(0.05)\n    return 0  # {i}" for i in range(24)]
        verdicts = run_programs(programs, [[check("assert f(1) == 2"), check("assert f(2) == 3")]] * 24, workers=2)
    finally:
        stop.set()
        thread.join()
    assert killed and not any(v.ok or v.passed for v in verdicts)


def test_a_program_that_ends_its_helpers_ends_no_training():
    """Where no wall stops it: its verdict is an error of its own, and the others are judged."""
    with without("seccomp", "landlock", "namespaces"):
        assert kinds("import os\nos.kill(os.getppid(), 9)\nprint(1)", "print(1)", workers=1) == ["runtime_error", "passed"]


def test_helpers_stay_warm_and_nothing_leaks():
    run("print(1)", io("", "1"))
    helpers, before = list(verify._idle[os.getpid()]), (len(os.listdir("/proc/self/fd")), threading.active_count())
    run_programs(["print(1)", "import os; os.kill(os.getpid(), 9)", "while True: pass", "def f(): pass"],
                 [[io("", "1")]] * 3 + [[check("assert f() is None")]], timeout=0.2, workers=1)
    assert verify._idle[os.getpid()] == helpers
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_helpers_end_with_the_trainer_and_a_fork_of_it_has_its_own():
    code = ("go('print(1)')\nif os.fork() == 0:\n    print(go('print(1)', 'print(2)'), *[h.process.pid for h in verify._idle[os.getpid()]], flush=True)\n"
            "    os.kill(os.getpid(), 9)\nos.wait()\nprint(go('print(1)'), *[h.process.pid for h in verify._idle[os.getpid()]], flush=True)")
    fork, trainer = (line.partition("] ") for line in python(code))
    assert (fork[0], trainer[0]) == ("['passed', 'failed_test'", "['passed'")
    assert gone([int(pid) for line in (fork, trainer) for pid in line[2].split()])


def test_blocked_and_ignored_signals_of_the_trainer_do_not_matter():
    out = python("signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
                 "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU])\n"
                 "print(go('print(1)', 'while 1: pass', 'import time; time.sleep(9)', timeout=0.2))")
    assert out == ["['passed', 'timeout', 'timeout']"]


def test_a_helper_that_hangs_is_replaced(monkeypatch):
    fresh()
    run("print(1)", io("", "1"))
    os.kill(verify._idle[os.getpid()][-1].process.pid, 19)
    monkeypatch.setattr(verify, "_PATIENCE", 1)
    assert kinds("print(1)", "print(2)", workers=1, timeout=0.2) == ["passed", "failed_test"]


def test_without_any_helper_it_raises(monkeypatch, tmp_path, capfd):
    fresh()
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such luck')")
    for module, name, value, said in ((sys, "executable", "/nonexistent/python", "nonexistent"), (sys, "platform", "darwin", "needs Linux.*darwin"),
                                      (verify, "_FILE", str(tmp_path / "broken.py"), "helpers died")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises((SandboxError, OSError), match=said):
                run("print(1)", io("", "1"))
    assert "no such luck" in capfd.readouterr().err and run("print(1)", io("", "1")).ok


def test_missing_walls_are_announced_once():
    code = "verify._without.add('landlock')\ngo('print(1)', 'print(2)', workers=2)\nverify._idle.clear()\ngo('print(1)')\nprint(*verify.layers())"
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "seccomp\n" and done.stderr.count("\n") == 1 and "without landlock" in done.stderr


def test_a_quota_of_the_container_bounds_the_workers(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    real = open
    for quota, cores in (("max 100000", 64), ("350000 100000", 4), ("50000 100000", 1), ("", 64)):
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(verify, "open", lambda path: real(tmp_path / "cpu.max"), raising=False)
        assert verify._cores() == cores


def test_copied_out_and_as_a_plain_user():
    """verify.py alone in a folder, run by nobody with no privilege."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user; the other tests ran as a plain user")
    interpreters = [p for p in (sys.executable, "/usr/bin/python3") if subprocess.run(
        ["/bin/sh", "-c", f"{p} -c 1"], user=65534, group=65534, extra_groups=[], stderr=subprocess.DEVNULL).returncode == 0]
    if not interpreters:
        pytest.skip("no interpreter here that a plain user may run")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(ROOT / "verify.py", folder)
        code = (f"import sys; sys.path.insert(0, {folder!r}); sys.dont_write_bytecode = True\nimport verify\n"
                "programs = ['print(1)', 'import os\\nos.kill(os.getppid(), 9)\\nprint(1)', 'print(open(\"/etc/passwd\").read())',"
                " 'print(len(open(\"/dev/stdin\").read()) + 1)', 'def f(): return 1']\n"
                "io = [{'input': '', 'output': '1'}]\n"
                "print([v.outcome for v in verify.run_programs(programs, [io] * 4 + [[{'assert': 'assert f() == 1'}]])])\n"
                "print('seccomp' in verify.layers())")
        done = subprocess.run([interpreters[0], "-c", code], user=65534, group=65534, extra_groups=[], cwd=folder,
                              capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "['passed', 'runtime_error', 'runtime_error', 'passed', 'passed']", done.stderr
    assert lines[1] == "True"


def test_humaneval():
    """The canonical solutions of all 164 problems pass, a wrong one passes none."""
    path = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here; it is not part of the repository")
    problems = data.read_humaneval(path)
    right = run_programs([p.reference_solution for p in problems], [p.tests for p in problems], timeout=5)
    assert [p.problem_id for p, v in zip(problems, right) if not v.ok] == [] and len(right) == 164
    wrong = run_programs([p.problem + "    return 1\n" for p in problems], [p.tests for p in problems])
    assert [p.problem_id for p, v in zip(problems, wrong) if v.ok] == []


def test_the_command_names_the_walls():
    done = subprocess.run([sys.executable, str(ROOT / "verify.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(wall in done.stdout for wall in verify.WALLS)
