"""verify.py at its edges: answers, code blocks, honest programs, and programs that attack the verdict."""
import ast
import contextlib
import ctypes
import json
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


# ---------------------------------------------------------------- answers

THIN = "\u2009"

@pytest.mark.parametrize("text, answer", [
    ("24", "24"), (" 24", "24"), ("24.\n\n", "24"), ("-7", "-7"), ("3/4", "3/4"), ("1,234", "1,234"), ("50%", "50%"),
    ("so 4 + 5 = 9", "9"), ("7 coins\nthen 8 coins\n", "8"), ("it costs $5.50.", "5.50"), ("it is 1 1/2", "1 1/2"),
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


@pytest.mark.parametrize("prediction, reference", [
    ("24", "24"), (" 24", "24"), ("24.0", "24"), ("+24", "24"), ("007", "7"), ("5.", "5"), (".5", "0.5"), ("-.5", "-1/2"),
    ("1,234", "1234"), ("1,234,567", "1234567"), ("1000", "1,000.00"), (r"1{,}234", "1234"), (r"1\,234", "1234"),
    (r"1\,234\,567", "1234567"), (f"1{THIN}234", "1234"), ("1,\\!000", "1000"), ("１２３", "123"),  # full-width digits
    ("-$5", "-5"), ("$-5$", "-5"), ("- 5", "-5"), ("\u22125", "-5"), ("$1,234.50", "1234.5"), (r"\$1,000", "1000"),
    ("USD 5", "5"), ("Rs. 500", "500"), ("5 dollars", "5"), ("€5.50", "5.5"), ("5 €", "5"), ("2.50 dollars", "$2.5"),
    ("50%", "50"), (r"50\%", "50"), ("50 percent", "50"), ("24 coins left", "24"), (r"24\text{ cm}", "24"), ("5cm", "5"),
    ("5 m", "5"), ("42 m/s", "42"), ("5 cm^2", "5"), (r"5\text{ cm}^2", "5"), ("5 cm²", "5"), ("90°", "90"),
    (r"90^\circ", "90"), ("1/2 cup", "0.5"), ("5 pounds.", "5"), ("x = 24", "24"), ("x=5", "5"),
    ("0.5", "1/2"), ("2/6", "1/3"), ("2/4", "1/2"), (r"\frac{1}{2}", ".5"), (r"\dfrac{3}{4}", "0.75"), (r"\tfrac34", ".75"),
    (r"-\dfrac12", "-0.5"), (r"\frac{-3}{4}", "-.75"), (r"-\frac{3}{4}", "-.75"),
    ("1 1/2", "1.5"), ("-1 1/2", "-1.5"), (r"1\frac{1}{2}", "1.5"), (r"1 \frac12", "3/2"), (r"-1\frac{1}{2}", "-3/2"),
    ("1e3", "1000"), ("1.5e3", "1500"), ("1e-3", "0.001"), (r"1.5 \times 10^3", "1500"), (r"1.5\times10^{3}", "1500"),
    ("2 x 10^-3", "0.002"), (r"3\cdot 10^{2}", "300"), ("1e400", "10e399"), ("9" * 399, "9" * 399 + ".0"),
    ("(1, 2)", "(1,2)"), (r"\left(1, \frac{1}{2}\right)", "(1, 0.5)"), ("[0,1)", "[0, 1)"), ("(-\\infty, 2]", "(-\\infty,2]"),
    (r"\{1,2\}", r"\{2, 1\}"), (r"\{1,2\}", "{1.0,2}"), ("{(1,2),(3,4)}", "{(3,4),(1,2)}"), ("1, 2", "1,2"), ("(5)", "5"),
    ("Yes", "yes"), (r"\text{Yes}", "yes"), ("(B)", "b"), (r"\text{(B)}", "B"), ("x+1", "x + 1"), ("New  York", "new york"),
    ("$24$", "24"), (r"\(42\)", "42"), ("**42**", "42"), (r"\boxed{24}", "... so it is 24\n#### 24"), ("3:30", "3:30"),
    ("the answer is 24.", "24"), (r"\boxed{Answer: 24}", "24"), ("the answer is 42, because 6*7=42", "42"),
    ("24 or 25", "24 or 25"), ("first 41, then 43.\nThe answer is 42", "42"), ("\\boxed{41}? No.\nAnswer: 42", "42"),
])
def test_equal_answers(prediction, reference):
    assert math_equal(prediction, reference)
    assert math_equal(reference, prediction)


@pytest.mark.parametrize("prediction, reference", [
    ("24", "25"), ("-5", "5"), ("1,2", "12"), ("12,34", "1234"), ("1,23", "123"), ("1.000.000", "1000000"), ("1 234", "1234"),
    ("50%", "0.5"), ("0.3333", "1/3"), ("0.333333333333333333", "1/3"), ("0.0000001", "0"), ("0.1", "0.10000000000000001"),
    ("3 or 4", "3"), ("3 or 4", "4"), ("24 or more", "24"), ("42 43", "42"), ("42 43", "43"), ("#### 42 43", "42"),
    ("#### 42 43", "43"), ("41, 42, 43", "42"), ("3-4", "3"), ("3-4", "4"), ("between 3 and 4", "3"), ("3, maybe 4", "3"),
    (r"\boxed{3} \boxed{4}", "3"), (r"\boxed{3} \boxed{4}", "4"), (r"\boxed{3} or \boxed{4}", "4"), ("x=5 or x=6", "5"),
    ("not 5", "5"), ("about 5", "5"), ("", ""), (" ", " "), ("", "0"), (None, "24"), (None, ""),
    ("24!", "24"), ("3!", "6"), ("2^3", "8"), ("10^3", "1000"), ("5²", "25"), ("5²", "52"), ("5+3", "8"), ("2*3", "6"),
    ("5 - 3", "5"), ("5x10", "5"), ("2x", "2"), ("2 x", "2"), (r"2\pi", "2"), ("2 pi", "2"), ("3 million", "3"), ("4 dozen", "4"),
    ("2 1 2", "2.5"), ("1 3/2", "2.5"), (r"2\frac{1}{2}", "21/2"), ("1/0", "0"), (r"\frac{1}{0}", "0"), ("inf", "1e999"),
    ("(1,2)", "(2,1)"), ("(0,1)", "[0,1]"), ("{1,2}", "(1,2)"), ("1,2", "(1,2)"), ("[1,2", "[1,2]"), ("no", "yes"),
    ("9" * 401, "9" * 401 + ".0"), ("1e401", "10e400"), ("0." + "3" * 5000, "0." + "3" * 5000),
    ("twenty", "20"), ("\u0662\u0664", "24"),  # arabic digits
])
def test_different_answers(prediction, reference):
    assert not math_equal(prediction, reference)
    assert prediction is None or not math_equal(reference, prediction)


@pytest.mark.parametrize("guesses", [
    "3 or 4", "4 or 3", "3 apples or 4 apples", "so 3, 4", "3 4", "3-4", "3 to 4", "3 & 4", "3; 4", "maybe 3 or maybe 4",
    r"\boxed{3} \boxed{4}", r"\boxed{4}, \boxed{3}", "#### 3 4", "#### 4 or 3", "The answer is 3 or 4.", "Answer: 3, 4",
])
def test_hedges_match_nothing(guesses):
    """The way from the executor's output to the reward: extract, then compare."""
    assert not math_equal(extract_answer(guesses), "3") and not math_equal(extract_answer(guesses), "4")


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


# Kinds of public bug reports on answer checkers, with values of our own.
@pytest.mark.parametrize("prediction, reference", [
    ('5 more apples', '5'), ('Mia has 12 apples left', '12'), ('f(3) = 9', '9'), ('g(-2)=4', '4'),
    ('x \\in [1, 4)', '[1,4)'), ('x\\in\\{1,2\\}', '\\{1,2\\}'), ('3 and 4', '3, 4'), ('3, 4 and 5', '3, 4, 5'),
    ('3, 4, and 5', '3,4,5'), ('\\frac{\\sqrt{5}}{3}', '\\frac{\\sqrt5}{3}'), ('\\tfrac12', '1/2'), ('¾', '3/4'),
    ('2½', '2.5'), ('5³', '5^3'), ('√7', '\\sqrt{7}'), ('3√2', '3\\sqrt{2}'), ('\\sqrt 2', '\\sqrt{2}'),
    ('x ≥ 4', 'x\\geq 4'), ('x>=4', 'x \\ge 4'), ('\\frac{3}{-4}', '-3/4'), ('3/(-4)', '-3/4'),
    ('\\frac{-3}{-4}', '3/4'), ('24 个苹果', '24'), ('250元', '250'), ('15 km/h', '15'), ('3 hours', '3'),
    ('$12', '12 dollars'), ('\\text{Tuesday}', 'Tuesday'), ('option B', 'B'), ('(D)', 'D'), ('B.', 'B'),
    ('101_{2}', '101_2'), ('101₂', '101_2'), ('5\\pi \\text{ cm}^2', '5\\pi'), ('5π square meters', '5\\pi'),
    ('2\\sqrt{3} units', '2\\sqrt{3}'), ('\\displaystyle\\frac{7}{8}', '7/8'), ('\\textbf{36}', '36'),
    ('\\mathbf{36}', '36'), ('p+q=37', '37'), ('m + n + p = 40', '40'), ('12 ÷ 4 = 3', '3'),
    ('$130 - $60 = $70', '70'), ('70 dollars profit', '70'), ('a profit of $70', '70'), ('3,000,000', '3000000'),
    ('x = -4', 'x=-4'), ('-4', 'x = -4'), ('7 pm', '7 pm'), ('7', '7 pm'), ('3 million', '3 million'),
    ('\\begin{bmatrix}1\\\\2\\end{bmatrix}', '\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}'),
    ('\\begin{pmatrix}\\frac12\\\\2\\end{pmatrix}', '\\begin{pmatrix} 0.5 \\\\2 \\end{pmatrix}'), ('{{7}}', '7'),
    ('90 degrees', '90°'), ('12%', '12 percent'), ('2^{10}', '2^10'), ('e^{-x}', 'e^{-x}'), ('x**2', 'x^2'),
    ('\\left\\{3,4\\right\\}', '\\{4,3\\}'), ('(0, ∞)', '(0,\\infty)'), ('[2,\\infty)', '[2, ∞)'), ('1⁄2', '1/2'),
    ('10 1/2', '10.5'), ('50 mph', '50'), ('5 kilograms', '5 kg'), ('The answer is 5', '5'), ('12 square feet', '12'),
    ('12 sq ft', '12'), ("5'", "5'"), ('3 hours per day', '3'), ('5 in.', '5'), ('45^{\\circ}', '45'),
    ('12 students', '12'), ('12 bags of rice', '12'), ('\\frac{2\\sqrt{3}}{3}', '2√3/3'), ('\\$18.00', '18'),
    ('18 dollars.', '18'), ('7 days', '7'), ('she needs 7 more days', '7'), ('It takes 7 days.', '7'),
    ('5x+3', '5x + 3'), ('y = 2x+1', 'y=2x+1'), ('2x+1', 'y=2x+1'), ('1.5 hours', '1.5'),
    ("12 o'clock", "12 o'clock"), ('\\{-1, 3\\}', '\\{3,-1\\}'), ('(3,-2)', '\\left(3,-2\\right)'), ('5 tbsp', '5'),
    ('6 ways', '6'), ('120 cubic centimeters', '120'), ('5 apples each', '5'), ('\\dfrac{\\pi}{3}', 'π/3'),
    ('10\\%', '10'), ('y=x^{2}', 'y = x²'), ('-3/4', '-\\frac34'), ('15 minutes', '15 min'),
    ('$\\frac{1}{3}$', '1/3'), ('\\frac{x+1}{2}', '(x+1)/2'), ('20\\,\\mathrm{m/s^2}', '20'),
    ('7\\,\\text{cm}', '7 centimeters'), ('14:30', '14:30'), ('\\sqrt{2}+1', '\\sqrt2 + 1'), ('3.0 × 10^8', '3e8'),
    ('A', 'a'), ('\\left(\\frac{3}{2}, 4\\right)', '(1.5, 4)'), ('No', 'no'), ('48 ㎝', '48'),
])
def test_spellings_and_units_that_mean_the_same(prediction, reference):
    assert math_equal(prediction, reference)


@pytest.mark.parametrize("prediction, reference", [
    ('5 hundredths', '5'), ('7 thirds', '7'), ('3 halves', '3'), ('5 lakh', '5'), ('2 gross', '2'), ('2 theta', '2'),
    ('2\\theta', '2'), ('3 abc', '3'), ('4 xyz', '4'), ('5 ab', '5'), ('2/pi', '2'), ('1/x', '1'), ('7 am', '7 pm'),
    ('44 BC', '44 AD'), ('a loss of 5', 'profit of 5'), ('5 fewer', '5 more'), ('3 below zero', '3'),
    ('3 degrees below zero', '3'), ('y=3', 'x=3'), ('5 km', '5 m'), ('5 cm', '5 mm'), ('5 cents', '5 dollars'),
    ('5 cents', '$5'), ('24万', '24'), ('3 kilo dozens', '3'), ('x=2, y=3', 'x=3, y=2'), ('y=2, x=3', 'x=2,y=3'),
    ('12 dollars and 50 cents', '12'), ('52_7', '52_8'), ('√3', '3'), ('\\frac{1}{2}3', '1/23'), ('2^{3x}', '2^3 x'),
    ('x ≤ 3', 'x < 3'), ('x≥3', 'x≤3'), ('[1,2]', '(1,2)'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}1&2\\end{pmatrix}'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{vmatrix}1\\\\2\\end{vmatrix}'), ('June 5', 'July 5'),
    ('5, yes', '5, no'), ('about 7', '7'), ('at least 7', '7'), ('not 7', '7'), ('7 or so', '7'), ('2*7=15', '14'),
    ('2x=10', '10'), ('x^2=9', '9'), ('1/2x', '1/2'), ('5!', '5'), ('5 squared', '5'), ('-5', '5'), ('3k', '3'),
    ('3M', '3'), ('3 K', '3'), ('half of 12', '12'), ('12 and a half', '12'), ('x\\frac{-1}{2}', 'x-1/2'),
    ('2^{\\frac12}', '2^1/2'), ('x^21', 'x^2 1'), ('2i', '2'), ('3+4i', '3'), ('1:2', '12'), ('3rd', '3'),
    ('1st', '1'), ('12e', '12'), ('0x10', '16'), ('5 feet 3 inches', '5'), ('1 in 5', '5'),
    ('1 out of 5', '5'), ('π', '3.14'), ('∞', '-∞'), ('-∞', '\\infty'), ('{1,2}', '1,2'), ('(1,2,3)', '(1,2)'),
    ('{{1,2}}', '\\{1,2\\}'), ('5 percent', '0.05'), ('3 + 4', '7'), ('ab -1', '-1'), ('n = 5k', '5'), ('5n', '5'),
    ('√(16)', '4'), ('x=5 or 6', '5'), ('5 ± 2', '5'), ('5 pm', '5 am'), ('twice 5', '5'), ('minus 5', '5'),
    ('negative 5', '5'), ('5 over 6', '5'), ('log 5', '5'), ('ln 2', '2'), ('sin 30', '30'), ('10^6', '10'),
    ('6e', '6'), ('five', '5'), ('C', 'D'), ('CD', 'C'), ('AB', 'A'), ('3(x+1)', '3'), ('(3)(4)', '12'),
    ('4(5)', '4'), ('5 mod 7', '5'), ('5|6', '5'), ('5 μ', '5'), ('5 ohm alpha', '5'), ('2 sqrt 3', '2'),
    ('2√3', '2'), ('7 billion dollars', '7'), ('7bn', '7'), ('$7M', '7'), ('7k', '7'), ('1e400000', '1'),
    ('5 dozen eggs', '5'), ('5 and 6', '5'), ('5/0', '5'), ('1 1', '1'), ('-(-5)', '-5'), ('--5', '-5'), ('−5', '5'),
    ('5 south', '5 north'), ('P(A)=0.5', 'P(B)=0.5'), ('x_1=3', 'x_2=3'), ('f(2)=7', 'f(3)=7'),
    ('\\overline{12}', '12'), ('0.\\overline{3}', '0.3'), ('0.333...', '0.333'), ('12...', '12'), ('0.3̅', '0.3'),
    ('5 billionths', '5'), ('5‰', '5'), ('5 basis points', '5'), ('10 3', '10'), ('10/3/2', '10/3'),
    ("- 24 apples", "-24"), ("- 24 apples", "24"),
])
def test_what_makes_another_number_of_it(prediction, reference):
    assert not math_equal(prediction, reference) and not math_equal(reference, prediction)


@pytest.mark.parametrize("text, reference", [
    ('So \\boxed{9}. The answer is elegant.', '9'), ('#### 9\nThe answer is fully consistent.', '9'),
    ('#### 18\n#### Explanation\nwe add 3 and 4', '18'),
    ('\\boxed{18}\n\nThe final answer is in \\boxed{} above', '18'), ('#### 6*4 = 24', '24'),
    ('Answer: a+b = 3+4 = 7', '7'), ('Answer: Tom has 7 pens left', '7'), ('The answer is option D.', 'D'),
    ('\\boxed{\\text{The answer is 7}}', '7'), ('Final answer - 24', '24'), ('Answer:\n\n- 24 apples', '24'),
    ('Answer:\n* 24', '24'), ('The answer is -24', '-24'), ('Answer: –24', '-24'),
    ('<think>\\boxed{5} hmm</think>\nSo the total is 6.', '6'), ('The answer is $2\\sqrt{3}$ cm.', '2\\sqrt{3}'),
    ('Thus, the perimeter is $12$.', '12'), ('The answer is: **C**', 'C'), ('The answer is (C).', 'C'),
    ('#### 2*7 = 14 apples', '14'), ('#### $18', '18'), ('#### 18 dollars per day', '18'), ('#### Answer\n18', '18'),
    ('## Final Answer\n\n**18**', '18'), ('The answer is 1,000.', '1000'), ('The answer is 3.5.', '3.5'),
    ('The answer is\n\n$$\\frac{3}{4}$$', '3/4'), ('答案是 24', '24'), ('答案：24个', '24'),
    ('So the total cost is $18 + $5 = $23.', '23'), ('She makes 9 * 2 = $<<9*2=18>>18 every day', '18'),
    ('\\boxed{12 \\text{ apples}}', '12'), ('\\boxed{x=12}', '12'), ('\\boxed{\\$12}', '12'),
    ('The answer is therefore 12.', '12'), ('#### Step 3: Sum up\n5+6=11\nSo 11 apples.', '11'),
    ('### Final Answer\n11', '11'), ('The answer is $\\boxed{\\frac{3}{4}}$.', '0.75'), ('\\boxed 8', '8'),
    ('\\boxed8', '8'), ('The answer is in the box: \\boxed{8}', '8'), ('Hence 8 apples remain. #### 8', '8'),
    ('A: 8', '8'), ('**Answer: 8**', '8'), ('Answer: \\(8\\)', '8'), ('Answer: \\[8\\]', '8'),
    ('Answer: $8$ apples', '8'), ('The answer is 8 because 4*2=8', '8'), ('The answer is 8, since 4*2=8', '8'),
    ('total = 8 apples, right?', '8'),
])
def test_the_answer_of_a_text(text, reference):
    assert math_equal(extract_answer(text), reference)


@pytest.mark.parametrize("text, reference", [
    ('Answer: 7, which is 2 more than 5', '7'), ('The answer is 7 and also 8', '7'), ('Final answer - 24', '-24'),
    ('#### - 24', '-24'), ('\\boxed{5}\nLet me check \\boxed{6', '6'), ('so 12. The answer is \\boxed{12', '12'),
    ('<think>the answer is 5', '5'), ('<think>\\boxed{5} hmm</think>\nSo the total is 6.', '5'),
    ('\\boxed{7}\n<think>\nmaybe 8', '8'), ('There are 3 million', '3'), ('It has 4 dozen.', '4'), ('so y = 3x', '3'),
    ('= 2^3', '3'), ('it is about 7', '7'), ('The area is \\sqrt{16}', '16'), ('Answer: (C) 24', 'C'),
    ('Thus x = 5 and y = 6.', '6'), ('The answers are 5 and 6', '6'),
    ('the temperature is 5 degrees below zero', '5'), ('Answer: 5 degrees below zero', '-5'),
    ('The answer is unknown.', '5'), ('I got 12. Wait, the answer is not 12.', '12'),
    ('The answer is 12, not 13.', '12'), ('The answer is 12 (not 13).', '12'), ('\\boxed{12}\\boxed{13}', '13'),
    ('Answer: 8 (4 per box)', '8'), ('The answer is 8!', '8'),
])
def test_not_the_answer_of_a_text(text, reference):
    assert not math_equal(extract_answer(text), reference)


@pytest.mark.parametrize("call, named", [
    (lambda: extract_answer(None), "text"), (lambda: extract_answer(b"5"), "text"), (lambda: extract_code(None), "text"),
    (lambda: verify.code_blocks(5), "text"), (lambda: math_equal("5", 5), "reference"),
    (lambda: math_equal("5", None), "reference"), (lambda: math_equal(5, "5"), "prediction")])
def test_bad_texts_are_named(call, named):
    with pytest.raises(ValueError, match=f"^{named} must be a string"):
        call()


PIECES = r"""\boxed{ \fbox{ } { \frac \dfrac \sqrt [ ] ( ) ^ _ 12 3.5 1,234 - #### $ \$ % \text{ apples x = and or , ; <think> </think>
    \begin{pmatrix} \end{pmatrix} \\ & ½ √ π ∞ ³ ⁄ 元 \infty \le \in 1e9 / ** `` ``` ~~~ python \left \right \{ \} ! ° \circ … because
    - {,} € \, dozen 999999999999""".split() + [" ", "\n", "answer is ", "Answer: ", "Step 2:", "\ud800", "\0"]


@pytest.mark.parametrize("count", [500, pytest.param(60_000, marks=pytest.mark.slow)])
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

@pytest.mark.parametrize("text, code", [
    ("x = 1", "x = 1"), ("```python\nx = 1\n```", "x = 1"), ("```py\nx = 1\n```\nbye", "x = 1"),
    ("~~~python3\nx = 1\n~~~", "x = 1"), ("```python3\nx = 1\n```", "x = 1"),
    ("```\na\n```\nor\n```\nb\n```", "b"), ("hi\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    ("```\r\nx\r\ny\r\n```\r\n", "x\ny"),
    ("\ufeffx = 1", "x = 1"), ("\ufeff```\n\ufeffx = 1\n```", "x = 1"), ("~~~\n```\n~~~", "```"),
    ("````\n```\n````", "```"),
    ("x = 1\n```\n", "x = 1"), ("```\na\n```\n```", "a"),
    ("1. so\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
    ("print('```')", "print('```')"), ("", ""),
    ("```python\nx = 1\n```\nOutput:\n```\n17\n```", "x = 1"), ("```python\nx = 1\n```\n```text\ny = 2\n```", "x = 1"),
    ("```py\nx = 1\n```\nRun:\n```sh\npython a.py\n```", "x = 1"), ("```\nx = 1\n```\n```\n[1, 2]\n```", "x = 1"),
    ("```\nx = 1\n```\n```\n$ python a.py\n```", "x = 1"), ("```\nx = 1\n```\n```\n>>> x\n1\n```", "x = 1"),
    ("```python\nx = 1\n```\n**Expected output:**\n```\ny = 2\n```", "x = 1"), ("```python\nx = 1\n```\n```markdown\n# y\n```", "x = 1"),
    ("```python\nx = 1\n```\n```\nHello World\n```", "x = 1"), ("```python\nx = 1\n```\n```\n4 5 6\n```", "x = 1"),
    ("```python\nx = 1\n```\n```\nhello\n```", "x = 1"), ("```python\nx = 1\n```\n```\n# Notes\n\nsome words here\n```", "x = 1"),
    ("```cpp\nint x;\n```\n```py\nx = 1\n```", "x = 1"), ("```python\nx = 1\n```\n```cpp\nint x;\n```", "x = 1"), ("```json\n{}\n```", "{}"),
    ("```python import sys\nprint(1)\n```", "import sys\nprint(1)"), ("```print(1)\n```", "print(1)"),
    ('```python title="a.py"\nx = 1\n```', "x = 1"), ("```{.python .numberLines}\nx = 1\n```", "x = 1"),
    ("```python\nx = 1```", "x = 1"), ("```python\nx = 1\nprint(x)```\nDone.", "x = 1\nprint(x)"), ("```python print(5)```", "print(5)"),
    ("```Python3.11\nx = 1\n```", "x = 1"), ("```main.py\nx = 1\n```\n```\n5\n```", "x = 1"),
    ("```python\ndef f(a):\n    return a\n```\nExample:\n```python\nprint(f(2))\n```", "def f(a):\n    return a"),
    ("```python\ndef f(a):\n    return a\n```\nBetter:\n```python\ndef f(a):\n    return 2 * a\n```", "def f(a):\n    return 2 * a"),
    ("<think>\n```python\nx = 0\n```\n", ""), ("<think>\n```python\nx = 0\n```\n</think>\nx = 1", "\nx = 1"),
])
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_the_block_that_defines_what_the_tests_ask_for():
    text = "```python\ndef g(x):\n    return x\n```\nthen\n```python\ndef f(x):\n    return 2 * x\n```\nand\n```python\nprint(f(3)\n```"
    blocks = verify.code_blocks(text)
    assert len(blocks) == 3
    verdicts = run_programs([blocks] * 3, [[check("assert f(2) == 4")], [check("assert g(2) == 2")], [check("assert h(2) == 2")]])
    assert [v.outcome for v in verdicts] == ["passed", "passed", "compile_error"]  # nothing defines h: it is the last
    assert run(("x = (", "print(1)"), io("", "1")).ok
    with pytest.raises(ValueError, match=r"programs\[0\]"):
        run([], io("", "1"))


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

SUM = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize("program", [
    SUM,
    "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
    "print(sum(map(int, open(0).read().split())))",
    "print(sum(map(int, open('/dev/stdin').read().split())))",
    "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "import os\n" + SUM + "\nimport sys\nsys.stdout.flush()\nos._exit(0)",
    "import sys\nsys.stdin.seek(0) if sys.stdin.seekable() else 0\nsys.stdout.write(str(sum(map(int, sys.stdin.readline().split()))))",
    f"if __name__ == '__main__':\n    {SUM}\n    exit()",
    SUM + "\nquit(0)", SUM + "\nraise SystemExit", "import sys\n" + SUM + "\nsys.exit()",
    "import sys, threading\nthreading.stack_size(1 << 28)\nsys.setrecursionlimit(10**6)\n"
    "def f(n): return n and f(n - 1)\ndef main(): f(20000); " + SUM + "\nthreading.Thread(target=main).start()",
    "import sys, functools\nsys.setrecursionlimit(10**5)\n@functools.lru_cache(None)\ndef f(n): return n and f(n - 1)\nf(9000)\n" + SUM,
    "import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and f(n - 1)\nf(15000)\n" + SUM,
    "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 25, resource.getrlimit(resource.RLIMIT_STACK)[1]))\n" + SUM,
    "import atexit\nout = []\natexit.register(lambda: print(*out))\nout.append(sum(map(int, input().split())))",
    "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
    "import io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb'), write_through=False)\n" + SUM,
    "import os, sys\nsys.stdout = open(os.devnull, 'w')\nsys.stdout.write('x')\nsys.stdout = sys.__stdout__\n" + SUM,
    "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\nopen('a.txt', 'w').write('x')\nopen('a.txt').read()\n" + SUM,
    "import asyncio\nasync def main(): " + SUM + "\nasyncio.run(main())",
    "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p: list(p.map(abs, [1, 2]))\n" + SUM,
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: 'int'\nprint(A(sum(map(int, input().split()))).n)",
    "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\n"
    "print(pickle.loads(pickle.dumps(A(sum(map(int, input().split()))))).n)",
    "import os, sys\nsys.stderr.write('debug ' * 9999)\nos.listdir('.')\n" + SUM,
    "import decimal, fractions, heapq, bisect, statistics, datetime, csv, hashlib, zlib, uuid\ndatetime.datetime.now()\n" + SUM,
    "\ufeff" + SUM, SUM + "\r\n", "# -*- coding: latin-1 -*-\n" + SUM,
    "import time\ntime.sleep(0.3)\n" + SUM, "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(5)\n" + SUM,
    "import time, sys\nprint(sum(map(int, sys.stdin.read().split())), flush=True)\ndef g():\n    yield\nx = g()\nnext(x)",
], ids=lambda program: program[:40])
def test_honest_stdin_programs(program):
    verdict, alone = run(program, io("1 2 3\n", " 6 \n\n"), io("4", "4"), io("5 5\n", "10")), run(program, io("5 5", "10"))
    assert verdict.ok and verdict.total == 3 and alone.ok, verdict


def test_several_tests_cost_one_process_when_all_pass(monkeypatch):
    """Whatever else happens, each test gets a process of its own: also where one test spoils the next."""
    runs, real = [], verify._run
    monkeypatch.setattr(verify, "_run", lambda *a: runs.append(1) or real(*a))
    tests = [io("1 2", "3"), io("\ud800é 1", "1"), io("", "0"), io("7 " * 9, "63")]
    body = "import sys\nx = sum(int(n) for n in sys.stdin.buffer.read().split() if n.isdigit())\n"
    assert run(body + "print(x)", *tests).passed == 4 and len(runs) == 1
    thread = "import threading, time\nthreading.Thread(target=lambda x=x: time.sleep(0.05) or print(x)"
    runs.clear()
    assert run(body + thread + ").start()", *tests).passed == 4 and len(runs) == 1       # waited for after each test
    for spoils in ("print(x, flush=True)\nimport os\nos._exit(0)", "print(x, flush=True)\nimport os\nos.closerange(0, 20)",
                   "print(x)\nif hasattr(sys, 'seen'): print(9)\nsys.seen = 1",
                   "print(x)\nimport threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"):
        runs.clear()
        assert run(body + spoils, *tests).passed == 4 and len(runs) == 5, spoils


def test_line_ends_and_surrogates_are_the_same_in_several_tests():
    """Standard input does not translate line ends, and JSON must not join what encodes to two characters."""
    assert run("print(len(input()))", io("abc\r\n", "3"), io("ab\r\n", "2")).passed == 0
    assert run("import sys\nprint(len(sys.stdin.buffer.read()))", io("\ud800\udc00", "4"), io("é", "2")).passed == 1


@pytest.mark.parametrize("program, outcome, passed", [
    ("print(x if x else 1 / 0)", "runtime_error", 3), ("print(x if x else 5)", "failed_test", 3),
    # Right only where an earlier test has left something, and ends of tests that never were.
    ("n = getattr(sys, 'n', 0)\nsys.n = n + 1\nprint(x if n else -1)", "failed_test", 0),
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


@pytest.mark.parametrize("completion", [
    "```python3\n{}\n```", "~~~\n{}\n~~~", "Here:\n```python\n{}", "\ufeff```py\r\n{}\r\n```\r\nbye", "{}", "```\n{}\n````",
])
def test_honest_completions(completion):
    assert run(extract_code(completion.format(SUM)), io("1 2 3", "6")).ok


@pytest.mark.parametrize("program, statement", [
    ("def f(x): return x + 1", "assert f(1) == 2"),
    ("def f(x): return x + 1", "assert f(f(1)) == 3, 'message'"),
    ("def f(x): return x > 0", "assert f(1) is True and not f(-1) and f(2)"),
    ("def f(x): pass", "assert f(1) is None"),
    ("def f(x): return x / 3", "assert abs(f(1) - 1 / 3) < 1e-6"),
    ("def f(x): return x / 3", "assert math.isclose(f(1), 1 / 3)"),
    ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 1 / 3)"),
    ("def f(x): return [3, 1, 2]", "assert set(f(0)) == {1, 2, 3} and sorted(f(0)) == [1, 2, 3]"),
    ("def f(x): return (1, 'a', None, 2.5, b'x', {1: [2]}, {3}, frozenset([4]), 1j, True)",
     "assert f(0) == (1, 'a', None, 2.5, b'x', {1: [2]}, {3}, frozenset([4]), 1j, True)"),
    ("def f(x, y=0): return x - y", "assert f(y=1, x=2) == 1 and f(*[5], **{'y': 1}) == 4"),
    ("def f(x): return 10 ** x", "assert f(5000) == 10 ** 5000"),      # above Python's limit for decimal text
    ("def f(x): return float('inf') if x else float('nan')", "assert f(1) == float('inf') and f(0) != f(0)"),
    ("def f(x): return '\\ud800\\x00'", "assert f(0) == '\\ud800\\x00'"),
    ("from collections import Counter, OrderedDict, defaultdict, namedtuple\nP = namedtuple('P', 'a b')\n"
     "def f(x): return [Counter(x), OrderedDict(a=1), defaultdict(int, b=2), P(1, 2)]",
     "assert f('aab') == [{'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, (1, 2)]"),
    ("import enum\nclass E(enum.IntEnum): A = 3\ndef f(x): return E.A", "assert f(0) == 3"),
    ("def f(x):\n    while True:\n        yield x\n        x += 1", "assert next(f(3)) == 3"),
    ("def f(x): return map(str, range(x))", "assert list(f(3)) == ['0', '1', '2']"),
    ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),       # MBPP/126 names its function like a builtin
    ("LIMIT = 5\nif __name__ == '__main__': LIMIT = int(input())", "assert LIMIT == 5"),
    ("import sys\ndef f(x): return x\nif __name__ == '__main__': sys.exit(f(3))", "assert f(2) == 2"),
    ("import unittest\ndef f(x): return x\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)\n"
     "if __name__ == '__main__':\n    unittest.main()", "assert f(2) == 2"),
    ("def f(x):\n    if x < 0: raise ValueError('no')", "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"),
    ("def g(x): return x\ndef f(x): return x", "def check(candidate):\n    for i in range(9):\n        assert candidate(i) == i\ncheck(f)"),
    ("def f(x): return x", "import random\nfor _ in range(20):\n    n = random.randint(0, 9)\n    assert f(n) == n"),
    ("class F:\n    def __call__(self, x): return x\nf = F()", "assert f(2) == 2"),
    ("def f(x): print('debug'); input", "assert f(2) is None"),
    ("import sys\nsys.setrecursionlimit(10**5)\ndef f(x): return x and f(x - 1)", "assert f(9000) == 0"),
    ("def f(x):\n    x.append(1)\n    return x", "assert f([0]) == [0, 1]"),
])
def test_honest_assert_programs(program, statement):
    verdict = run(program, check(statement))
    assert verdict == Verdict("passed", 1, 1, "")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="from 3.12 Python itself bounds recursion through C")
def test_the_stack_is_larger_than_usual():
    program = ("import sys, functools\nsys.setrecursionlimit(10**6)\n@functools.lru_cache(None)\ndef f(n): return n and f(n - 1)\n"
               "f(40000)\nprint(1)")
    assert run(program, io("", "1")).ok


def test_kinds_can_be_mixed_and_many_asserts_fit():
    program = "def f(x):\n    return x\nprint(1)"
    tests = [io("", "1")] + [check(f"assert f({i}) == {i}") for i in range(450)] + [check("assert f(1) == 2, 'é' * 999")] * 450
    verdict = run(program, *tests)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("failed_test", 451, 901)


def test_set_order_and_random_numbers_do_not_change_between_runs_and_helpers():
    program = "import random\nprint(*{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}, random.random())"
    order = run(program, io("", "?")).detail
    assert "printed" in order and run(program, io("", "?")).detail == order
    verify._close_all()
    assert run(program, io("", "?")).detail == order


def test_long_honest_output_and_input():
    numbers = " ".join(map(str, range(60_000)))
    assert run("print('\\n'.join(input().split()))", io(numbers, numbers)).ok


# ---------------------------------------------------------------- outcomes

@pytest.mark.parametrize("program, outcome", [
    ("print(1", "compile_error"), ("x = '\0'", "compile_error"), ("x = '\ud800'", "compile_error"),
    ("(" * 5000 + ")" * 5000, "compile_error"), ("return 1", "compile_error"),
    ("print(2)", "failed_test"), ("", "failed_test"), ("print('1 1')", "failed_test"),
    ("import os; os.write(1, bytes(range(128, 256)))", "failed_test"), ("#" * 10**6 + "\nprint(2)", "failed_test"),
    ("1 / 0", "runtime_error"), ("assert False", "runtime_error"), ("print(1); exit(3)", "runtime_error"),
    ("import sys; print(1); sys.exit('bad')", "runtime_error"), ("print(1); import os; os._exit(1)", "runtime_error"),
    ("def f(n): return f(n + 1)\nf(0)", "runtime_error"), ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "runtime_error"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "runtime_error"), ("print(1); import os; os.abort()", "runtime_error"),
    ("x = bytearray(3 << 30)", "memory"), ("x = []\nwhile True: x.append(bytes(50 << 20))", "memory"),
    ("raise MemoryError", "memory"), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory"),
], ids=lambda value: value[:40])
def test_outcomes(program, outcome):
    stdin_verdict, assert_verdict = run_programs([program, program], [[io("", "1")], [check("assert f(1)")]])
    assert (stdin_verdict.outcome, stdin_verdict.passed, stdin_verdict.total) == (outcome, 0, 1)
    assert stdin_verdict.detail.startswith("test 1 of 1: ")
    if outcome != "failed_test":
        assert assert_verdict.outcome == outcome


def test_asserts_count_separately_and_the_worst_names_the_outcome():
    program = "def f(x):\n    return [1, 2][x]"
    tests = [check("assert f(0) == 1"), check("assert f(1) == 1"), check("assert f(2)"), check("assert f(1) == 2")]
    verdict = run(program, *tests)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("runtime_error", 2, 4)
    assert "test 3 of 4" in verdict.detail and "IndexError" in verdict.detail
    verdict = run(program, *tests[:2])
    assert verdict.outcome == "failed_test" and "the last value was 2" in verdict.detail


def test_all_tests_are_run_after_a_failure_but_none_after_a_timeout():
    failing = run("print(7)", io("", "1"), io("", "7"), io("", "2"), io("", "7"))
    assert (failing.outcome, failing.passed, failing.total) == ("failed_test", 2, 4)
    started = time.process_time(), time.monotonic()
    late = run("if input() == 'go':\n    while True: pass\nprint(1)", io("x", "1"), *[io("go", "1")] * 9, timeout=0.3)
    assert (late.outcome, late.passed, late.total) == ("timeout", 1, 10)
    assert time.monotonic() - started[1] < 2.6  # nine time-outs would take 2.7 s of CPU


def test_asserts_before_a_timeout_count():
    verdict = run("def f(x):\n    while x: pass\n    return 1", check("assert f(0)"), check("assert f(1)"), check("assert f(0)"), timeout=0.3)
    assert (verdict.outcome, verdict.passed, verdict.total) == ("timeout", 1, 3)


def test_timeouts():
    programs = ["while True: pass", "import time; time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
                "try:\n    while True: pass\nexcept BaseException:\n    print(1)", "9 ** 9 ** 9",
                # Ignoring the signals leaves RLIMIT_CPU, which ends it with SIGKILL: still late, and not out of memory.
                "import signal\nfor s in (signal.SIGPROF, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
                # Right, with a normal end, and the timer switched off, but after more CPU time than it had.
                "import signal, time\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile time.process_time() < 0.5: pass\nprint(1)"]
    started = time.monotonic()
    verdicts = run_programs(programs, [[io("", "1")]] * 7, timeout=0.3, workers=7)
    assert [v.outcome for v in verdicts] == ["timeout"] * 7
    assert time.monotonic() - started < 15


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
    assert run("", io("", ""), io("1", " \n"), check("  ")) == Verdict("no_tests", 0, 0, "no test expects anything")
    assert run("").outcome == "no_tests"
    assert run("print(1)", io("", ""), io("", "1")) == Verdict("passed", 1, 1, "")
    assert run("", check("assert True, 'it prints this'")).outcome == "no_tests"


# ---------------------------------------------------------------- attacks on the verdict

TESTS = [check("assert f(1) == 2"), check("assert f(2) == 3")]


@pytest.mark.parametrize("program", [
    # ending before the asserts
    "import os; os._exit(0)", "import sys; sys.exit(0)", "exit()", "raise SystemExit", "def f(x): exit()",
    "import os\ndef f(x): os._exit(0)", "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "import sys\nsys.excepthook = lambda *a: None\ndef f(x): raise KeyboardInterrupt", "def f(x): raise AssertionError",
    "import threading, os\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f(x):\n    while 1: pass",
    # objects that agree with everything
    "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return A(0)",
    "class A(str):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "class A(list):\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([self])\ndef f(x): return A()",
    "class A(tuple):\n    __class__ = int\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "class M(type):\n    def __eq__(self, other): return True\nclass f(metaclass=M):\n    def __init__(self, x): pass",
    "class A(float):\n    def __eq__(self, o): return True\n    def __repr__(self): return '2'\ndef f(x): return A(0)",
    # patched interpreter
    "import builtins\nbuiltins.exec = lambda *a: None\ndef f(x): return 0",
    "import builtins\nbuiltins.compile = lambda *a, **k: 'pass'\ndef f(x): return 0",
    "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\ndef f(x): return 0",
    "import json\njson.dumps = lambda *a, **k: '[\"passed\", \"\"]'\ndef f(x): return 0",
    "import os\nold = os.write\nos.write = lambda fd, data: old(fd, data.replace(b'failed_test', b'passed'))\ndef f(x): return 0",
    "import sys\nfor m in list(sys.modules.values()):\n    for n in ('_encode', '_decode', '_answer'):\n"
    "        if hasattr(m, n): setattr(m, n, lambda *a: ['value', 2])\ndef f(x): return 0",
    # forged markers on every descriptor, with and without an early end
    "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'[\"passed\", \"\"]\\n' * 9)\n    except OSError: pass\ndef f(x): return 0",
    "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'{\"code\": 0, \"cpu\": 0, \"late\": false, \"judged\": 0}')\n"
    "    except OSError: pass\nos._exit(0)",
    "import os\nos.write(3, b'[\"function\"]\\n' + b'[\"value\", true]\\n' * 9)\nwhile True: pass",
    "import os\nos.write(3, b'[\"value\", {\"evil\": 1}]\\n' * 9)\ndef f(x): return 0",
    "import os\nos.write(3, b'[' * 100000 + b'\\n')\nos._exit(0)", "import os\nos.close(3)\ndef f(x): return 2",
    "import os\nos.fork()\ndef f(x): return 0", "print('passed')\n__name__ = 'x'\ndef f(x): return 0",
    # values that are too much
    "def f(x):\n    a = []\n    a.append(a)\n    return a", "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "def f(x): return 'x' * (5 << 20)", "def f(x): return 1 << 10**8", "def f(x):\n    while True: yield 'x' * 10**6",
], ids=lambda program: program[:60])
def test_forged_passes(program):
    verdict = run(program, *TESTS, timeout=0.7)
    assert verdict.passed == 0 and verdict.total == 2 and not verdict.ok


@pytest.mark.parametrize("program, statement", [
    ("def abs(x): return 0\ndef f(x): return 9", "assert abs(f(1) - 1.5) < 1e-6"),
    ("class math:\n    isclose = lambda *a: True\ndef f(x): return 9", "assert math.isclose(f(1), 1.5)"),
    ("def set(x): return 0\ndef f(x): return [9]", "assert set(f(1)) == set([1])"),
    ("def check(c): pass\ndef f(x): return 9", "def check(c):\n    assert c(1) == 1\ncheck(f)"),
    ("f = 2", "assert f(1) == 2"), ("def f(x): return 10 ** 9", "assert 2 ** f(1) == 2"),
    ("def f(x): return 10 ** 18", "assert list(range(f(1))) == [1]"),
])
def test_the_program_has_no_say_in_the_comparison(program, statement):
    verdict = run(program, check(statement), timeout=0.5)
    assert (verdict.outcome, verdict.passed) == ("failed_test", 0)


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
    assert not verdict.ok and verdict.passed == 0 and len(verdict.detail) < 600


def test_an_unprintable_value_does_not_end_the_judge():
    assert run("def f(x): return 10 ** x", check("assert f(9999) == 1"), check("assert f(1) == 10")).passed == 1


def test_a_right_program_that_exits_early_has_not_passed():
    verdict = run("def f(x): return x + 1\nexit()", *TESTS)
    assert (verdict.outcome, verdict.passed) == ("runtime_error", 0) and "SystemExit" in verdict.detail and "did not run" in verdict.detail


def test_an_early_exit_keeps_the_asserts_before_it():
    verdict = run("import os\ndef f(x): return 2 if x == 1 else os._exit(0)", *TESTS)
    assert (verdict.outcome, verdict.passed) == ("runtime_error", 1)


def test_right_values_and_then_a_bad_end_are_no_pass():
    """The program takes the place of the code that answers, answers right, and ends with a status of its choice."""
    program = ("import json, os\nwith open(3, 'rb', closefd=False) as requests:\n    for line in requests:\n        request = json.loads(line)\n"
               "        reply = ['value', {{'object': 1}} if len(request) == 2 else request[2]['tuple'][0] + 1, None]\n"
               "        os.write(3, json.dumps(reply).encode() + b'\\n')\nos._exit({})")
    assert run(program.format(3), *TESTS).outcome == "runtime_error"
    assert run(program.format(0), *TESTS).ok


STACK = "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
NODE = "class Node:\n    def __init__(self, val, next=None): self.val, self.next = val, next\n"


@pytest.mark.parametrize("program, statement", [
    ("class Solution:\n    def twoSum(self, nums: List[int], target: int) -> Optional[List[int]]:\n        return [0, 1]",
     "assert Solution().twoSum([2, 7], 9) == [0, 1]"),
    (STACK, "s = Stack(); s.push(3); s.push(4); assert s.pop() == 4 and s.pop() == 3"),
    (STACK, "s = Stack()\ns.push([1])\nassert s.items == [[1]]"),
    (STACK, "s = Stack()\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass"),
    ("class S:\n    def __init__(self): self.a = []\n    def __len__(self): return len(self.a)\n    def add(self, x): self.a.append(x)",
     "s = S(); s.add(1); assert len(s) == 1 and s.a[0] == 1"),
    ("class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n    def __repr__(self): return f'V({self.x})'",
     "v = V(1) + V(2); assert v.x == 3 and repr(v) == 'V(3)' and str(v) == 'V(3)'"),
    ("class G:\n    def __getitem__(self, i): return i * 2\n    def __iter__(self): return iter([1, 2])", "g = G(); assert g[3] == 6 and list(g) == [1, 2] and 2 in g"),
    (NODE + "def rev(n):\n    p = None\n    while n: n.next, p, n = p, n, n.next\n    return p",
     "n = rev(Node(1, Node(2, Node(3))))\nout = []\nwhile n:\n    out.append(n.val)\n    n = n.next\nassert out == [3, 2, 1]"),
    (NODE, "a = Node(1)\na.next = Node(2)\na.val = 7\nassert a.val == 7 and a.next.val == 2 and a.next.next is None"),
    ("class C:\n    n = 0\n    @classmethod\n    def make(cls): cls.n += 1; return cls()\n    @staticmethod\n    def twice(x): return 2 * x\n    @property\n    def p(self): return 5",
     "c = C.make(); assert C.n == 1 and C.twice(4) == 8 and c.p == 5"),
    ("class M:\n    def __enter__(self): return 5\n    def __exit__(self, *a): return None", "with M() as x:\n    assert x == 5"),
    ("class It:\n    def __init__(self): self.n = 0\n    def __iter__(self): return self\n    def __next__(self):\n        self.n += 1\n        if self.n > 3: raise StopIteration\n        return self.n",
     "assert list(It()) == [1, 2, 3]"),
    ("def add(n):\n    def inner(x): return x + n\n    return inner", "assert add(2)(3) == 5"),
    ("import enum\nclass E(enum.Enum):\n    A = 'x'\ndef f(): return E.A", "assert f().value == 'x' and f().name == 'A'"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\ndef f(): return [P(1), P(3)]", "assert [(p.x, p.y) for p in f()] == [(1, 2), (3, 2)]"),
    ("def f(x): x.sort()", "x = [2, 1]; f(x); assert x == [1, 2]"),
    ("def f(x): x['b'] = x.pop('a')", "x = {'a': [1]}\nf(x)\nassert x == {'b': [1]}"),
    ("def f(x, y): x.append(y.pop())", "x, y = [1], [2]; f(x, y=y); assert (x, y) == ([1, 2], [])"),
    ("def f(x): x[0].append(1); x.clear() if len(x) > 3 else None", "x = [[], 2]; f(x); assert x == [[1], 2]"),
    ("def f(x): x.add(3)", "x = {1}; f(x); assert x == {1, 3}"), ("def f(x): x.rotate(1)", "from collections import deque\nx = deque([1, 2, 3]); f(x); assert x == deque([3, 1, 2])"),
    ("class R:\n    def rotate(self, m: List[List[int]]) -> None: m[:] = [list(r) for r in zip(*m[::-1])]", "m = [[1, 2], [3, 4]]; R().rotate(m); assert m == [[3, 1], [4, 2]]"),
    ("from decimal import Decimal\ndef f(x): return Decimal(x) / 4", "assert f(10) == 2.5 and f(1) == __import__('decimal').Decimal('0.25')"),
    ("from fractions import Fraction\ndef f(x): return Fraction(x, 6)", "from fractions import Fraction\nassert f(3) == Fraction(1, 2) and f(6) == 1"),
    ("import datetime as d\ndef f(x): return [d.date(2020, 1, x), d.datetime(2020, 1, 2, 3, 4, 5, 6), d.timedelta(days=x), d.time(4)]",
     "import datetime as d\nassert f(2) == [d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3, 4, 5, 6), d.timedelta(2), d.time(4)]"),
    ("from collections import deque, namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return [deque(x), P(1, 2)]",
     "from collections import deque\nassert f([1]) == [deque([1]), (1, 2)]"),
    ("import datetime\ndef f(d): return d.year", "import datetime\nassert f(datetime.date(2021, 5, 6)) == 2021"),
    ("def f(x): return '[1, (2, -3.5)]'", "import ast\nassert eval(f(1)) == [1, (2, -3.5)] and ast.literal_eval(f(1)) == [1, (2, -3.5)]"),
    ("def f(x): return '2 ** 5 * 3 - 1'", "assert eval(f(1)) == 95"),
])
def test_honest_objects_and_changed_arguments(program, statement):
    assert run(program, check(statement)) == Verdict("passed", 1, 1, "")


ANY = "class Any:\n    def __eq__(self, o): return True\n    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda self, o: True\n    __hash__ = lambda self: 1\n"


@pytest.mark.parametrize("program, statement", [
    (ANY + "def f(x): return Any()", "assert f(1) == 5"), (ANY + "def f(x): return Any()", "assert 5 == f(1)"),
    (ANY + "def f(x): return Any()", "assert not f(1) != 5"), (ANY + "def f(x): return Any()", "assert f(1) < 3"),
    (ANY + "def f(x): return Any()", "assert f(1) in [1, 2]"), (ANY + "def f(x): return Any()", "assert 5 in f(1)"),
    (ANY + "def f(x): return [Any()]", "assert f(1) == [5]"), (ANY + "def f(x): return {1: Any()}", "assert f(1) == {1: 5}"),
    (ANY + "a = Any()\ndef f(x): return a", "assert f(1) == f(2)"), (ANY + "def f(x): return Any()", "assert {f(1)} == {5}"),
    (ANY + "def f(x): return Any()", "assert isinstance(f(1), int)"), (ANY + "def f(x): return Any()", "assert sorted([f(1), 2]) == [2, 5]"),
    ("class A:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return A()", "assert f(1) == 5"),
    ("class A:\n    __class__ = int\ndef f(x): return A()", "assert isinstance(f(1), int)"),
    ("class A(list):\n    def __eq__(self, o): return True\n    def __len__(self): return 1\ndef f(x): return A()", "assert f(1) == [5]"),
    ("class A:\n    def __reduce__(self): return (int, ('5',))\ndef f(x): return A()", "import copy\nassert copy.copy(f(1)) == 5"),
    ("class A:\n    def __getattr__(self, n): return self\n    def __call__(self, *a): return self\ndef f(x): return A()", "assert f(1).value() == 5"),
    ("class A:\n    def __getattr__(self, n): return lambda *a: True\ndef f(x): return A()", "assert f(1).items == [5]"),
    ("class A:\n    def __getattribute__(self, n): raise SystemExit\ndef f(x): return A()", "assert f(1).x == 5"),
    ("class Stack:\n    def push(self, x): pass\n    def pop(self):\n        while True: pass", "s = Stack(); s.push(3); assert s.pop() == 3"),
    ("def f(x):\n    while True: x.append(1)", "x = []; f(x); assert x == [1]"), ("def f(x):\n    x.append(x)", "x = []; f(x); assert x == [1]"),
    ("def f(x): x[:] = range(10 ** 7)", "x = []; f(x); assert x == [1]"), ("def f(x): x.append(type('A', (), {'__eq__': lambda *a: True})())", "x = []; f(x); assert x == [1]"),
    ("class A: pass\ndef f(x): return [A() for _ in range(10 ** 6)]", "assert f(1) == [5]"),
    ("class A: pass\ndef f(x): return A()", "while f(1): pass\nassert False"),
    ("import os\ndef f(x): os.write(3, b'[\"value\", {\"object\": 1}, [[1, 2]]]\\n' * 9)", "x = [2, 1]; f(x); assert x == [1, 2] and f(3) == 5"),
    ("import os\ndef f(x): os.write(3, b'[\"value\", {\"object\": [1]}, 7]\\n' * 9)", "x = [2, 1]; f(x); assert f(3) == 5"),
    ("class D:\n    def __init__(self, *a): pass\n    def __str__(self): return '5'\nimport decimal\ndecimal.Decimal = D\ndef f(x): return D()", "assert f(1) == 5"),
    ("import decimal\nclass D(decimal.Decimal):\n    def __eq__(self, o): return True\ndef f(x): return D(3)", "assert f(1) == 5"),
    ("def f(x): return '__import__(\"os\")._exit(0)'", "assert eval(f(1)) == 5"), ("def f(x): return '[c for c in (5,)][0]'", "assert eval(f(1)) == 5"),
    ("def f(x): return '9 ** 9 ** 9'", "assert eval(f(1)) == 5"), ("def f(x): return '9 ** 99999999'", "assert eval(f(1)) == 5"), ("def f(x): return '\"a\" * 10 ** 9'", "assert eval(f(1)) == 5"),
    ("def f(x): return '(' * 9000 + ')' * 9000", "assert eval(f(1)) == 5"), ("def f(x): return 'x ='", "import ast\nassert ast.literal_eval(f(2)) == [1]"),
    ("def f(x): return 7", "import ast\nassert ast.literal_eval(f(2)) == [1]"), ("def f(x): return None", "assert eval(f(2)) == 5"),
], ids=lambda value: value[:50])
def test_objects_that_lie_and_values_that_are_code(program, statement):
    """None passes, none raises, and the test that follows keeps its chance unless time or memory is gone."""
    verdict = run(program, check(statement), timeout=0.5)
    assert verdict.passed == 0 and not verdict.ok and verdict.outcome != "no_tests"


def test_functions_as_arguments_are_named():
    verdict = run("class S:\n    pass", check("assert S() == 1"))
    assert verdict.outcome == "failed_test" and "cannot be compared" in verdict.detail
    for argument in ("lambda x: x", "len", "int", "math.sqrt", "type('T', (), {})()"):
        with pytest.raises(ValueError, match=r"tests\[0\]\[1\]\['assert'\] cannot be checked.*not a plain value"):
            run("def f(g): return 1", check("assert f(1) == 1"), check(f"assert f({argument}) == 1"))


@pytest.mark.parametrize("statement, said", [
    ("def check(candidate):\n    assert candidate(1) == 1", "no assert that runs"),
    ("def a(): b()\ndef b():\n    a()\n    assert f(1) == 1", "no assert that runs"), ("f(1) == 1", "no assert"),
    ("assert exec(f(1)) is None", "exec"), ("assert compile(f(1), '', 'eval')", "compile"), ("assert __import__(f(1))", "__import__"),
    ("e = exec\nassert e(f(1)) is None", "exec"), ("import pickle\nassert pickle.loads(f(1)) == 1", "pickle"),
    ("from marshal import loads\nassert loads(f(1)) == 1", "marshal"), ("assert __import__('pickle').loads(f(1)) == 1", "pickle"),
    ("import numpy\nassert f(1) == 1", "numpy.*standard library"), ("assert f(1) ==", "not a Python statement"),
])
def test_tests_that_are_refused_when_a_problem_enters(statement, said):
    with pytest.raises(ValueError, match=rf"tests\[1\]\['assert'\].*{said}"):
        verify.check_tests([io("1", "2"), check(statement)])
    with pytest.raises(ValueError, match=r"tests\[0\]\[1\]\['assert'\]"):
        run("def f(x): return 1", io("1", "2"), check(statement))


def test_tests_that_are_not_refused():
    verify.check_tests([io("1", "2"), check(""), check("import re\nassert re.compile('a+').match(f(1))"),
                        check("def check(c):\n    def inner():\n        assert c(1) == 1\n    inner()\ncheck(f)"),
                        check("class T:\n    def go(self):\n        assert f(1) == 1\nT().go()")])
    with pytest.raises(ValueError, match="^tests must be a list"):
        verify.check_tests(None)


def test_no_secret_in_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    program = "import os; print(*sorted(set(os.environ) - {'LC_CTYPE'}))"  # which Python itself sets in the C locale
    assert run(program, io("", "LD_BIND_NOW PYTHONHASHSEED PYTHONUTF8 TZ")).ok


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
    with only(set(verify.LAYERS) - {"landlock"}):
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


def test_the_trainers_memory_stays_flat_under_floods():
    """VmHWM, the peak; ru_maxrss would start at that of the process which started this one."""
    out = python("def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\ngo('print(1)'); before = peak()\n"
                 "go(*[f'import os\\nfor _ in range(15): os.write(1, bytes(10**6))  # {i}' for i in range(12)])\nprint(peak() - before)")
    assert int(out[0]) < 8000  # KiB; the programs wrote 15,000 each


# ---------------------------------------------------------------- attacks on the machine, and the walls one by one

@contextlib.contextmanager
def only(names):
    """The sandbox with these layers and no others."""
    verify._close_all()
    verify._SANS.update(set(verify.LAYERS) - set(names))
    try:
        yield
    finally:
        verify._SANS.clear()
        verify._close_all()


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """Everything that the attacks aim at, all of it throw-away: a process with a secret, a folder, sockets."""
    folder = tmp_path_factory.mktemp("victim")
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; x = 'open ' + 'sesame'; print(id(x), flush=True); time.sleep(600)"],
                               env={"SECRET": "sesame"}, stdout=subprocess.PIPE, text=True)
    address = int(process.stdout.readline())
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(str(folder / "stream"))
    unix.listen()
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(folder / "datagrams"))
    key = 0x5E5A0000 + os.getpid() % 65536
    libc = ctypes.CDLL(None)
    segment = libc.shmget(key, 4096, 0o1600)  # IPC_CREAT
    yield {"PID": process.pid, "ADDRESS": address, "FOLDER": str(folder), "TCP": tcp.getsockname()[1], "UDP": udp.getsockname()[1],
           "KEY": key}
    libc.shmctl(segment, 0, None)  # IPC_RMID
    process.kill()
    process.wait()
    process.stdout.close()
    for end in (tcp, udp, unix, datagrams):
        end.close()


CTYPES = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef ok(value):\n    if value < 0: raise OSError(ctypes.get_errno())\n"
ATTACKS = [  # what it tries, the walls that stop it alone (Seccomp, Landlock, Namespaces), the code: it raises when refused
    ("ask whether a signal would reach the victim", "SN", "os.kill(PID, 0)"),
    ("SIGSTOP it and let it go on", "SN", "os.kill(PID, signal.SIGSTOP); os.kill(PID, signal.SIGCONT)"),
    ("signal everything (signal 0, the same check)", "SN", "os.kill(-1, 0)"),
    ("a pidfd of it", "SN", "os.pidfd_open(PID)"),
    ("its resource limits", "SN", "resource.prlimit(PID, resource.RLIMIT_NOFILE, resource.prlimit(PID, resource.RLIMIT_NOFILE))"),
    ("its scheduling", "SN", "os.setpriority(os.PRIO_PROCESS, PID, os.getpriority(os.PRIO_PROCESS, PID))"),
    ("SIGIO to it through F_SETOWN", "SN", "fcntl.fcntl(0, fcntl.F_SETOWN, PID)"),
    ("ptrace it (PTRACE_SEIZE, which does not stop it)", "SLN", CTYPES + "ok(libc.ptrace(0x4206, PID, 0, 0))"),
    ("its memory by process_vm_readv", "SLN", CTYPES +
     "import struct\nb = ctypes.create_string_buffer(8)\nok(libc.process_vm_readv(PID, struct.pack('PN', ctypes.addressof(b), 8), 1, struct.pack('PN', ADDRESS, 8), 1, 0))"),
    ("its environment in /proc", "LN", "assert b'sesame' in open('/proc/PID/environ', 'rb').read()"),
    ("its memory in /proc", "LN", "f = open('/proc/PID/mem', 'rb', 0); f.seek(ADDRESS); f.read(8)"),
    ("its descriptors in /proc", "LN", "os.listdir('/proc/PID/fd')"),
    ("its command line in /proc", "LN", "open('/proc/PID/cmdline').read()"),
    ("read a file", "LN", "open('FOLDER/file').read()"),
    ("list a folder", "LN", "os.listdir('FOLDER')"),
    ("overwrite a file", "LN", "open('FOLDER/file', 'w').write('x')"),
    ("append to a file", "LN", "open('FOLDER/file', 'a').write('x')"),
    ("make a file", "LN", "open('FOLDER/new', 'w').write('x')"),
    ("delete a file", "LN", "os.unlink('FOLDER/file')"),
    ("rename a file", "LN", "os.rename('FOLDER/file', 'FOLDER/other')"),
    ("truncate a file", "LN", "os.truncate('FOLDER/file', 0)"),
    ("make a folder", "LN", "os.mkdir('FOLDER/folder')"),
    ("make a link", "SLN", "os.symlink('FOLDER/file', 'FOLDER/link')"),
    ("make a hard link", "SLN", "os.link('FOLDER/file', 'FOLDER/hard')"),
    ("chmod a file", "SN", "os.chmod('FOLDER/file', 0)"),
    ("chown a file", "SN", "os.chown('FOLDER/file', os.stat('FOLDER/file').st_uid, -1)"),
    ("give a file away", "SN", "os.chown('FOLDER/file', 12345, -1)"),
    ("its times", "SN", "os.utime('FOLDER/file', (0, 0))"),
    ("connect to a loopback port", "S", "socket.create_connection(('127.0.0.1', TCP), 2)"),
    ("listen", "S", "socket.create_server(('127.0.0.1', 0))"),
    ("send a datagram", "S", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))"),
    ("connect to a unix socket", "SN", "socket.socket(socket.AF_UNIX).connect('FOLDER/stream')"),
    ("a unix datagram out of a socketpair", "SN", "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', 'FOLDER/datagrams')"),
    ("shared memory of System V", "S", CTYPES + "ok(libc.shmget(KEY, 4096, 0o600))"),
    ("fork", "S", "os.fork() or os._exit(0)"),
    ("a daemon that outlives the run", "S", "if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(30)\n        os._exit(0)\n    os.wait()"),
    ("another program", "SLN", "os.posix_spawn('/bin/true', ['true'], {})"),
    ("exec", "SLN", "os.execv('/bin/sh', ['sh', '-c', 'echo harm'])"),
    ("a memfd", "S", "os.memfd_create('x')"),
    ("a new user namespace", "SN", CTYPES + "ok(libc.unshare(0x10000000))"),
    ("new rights", "SL", CTYPES + "assert libc.prctl(39, 0, 0, 0, 0) == 0"),
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
    setup, _, last = code.rpartition("def ok(value):\n    if value < 0: raise OSError(ctypes.get_errno())\n") if "def ok" in code else ("", "", code)
    setup = setup and setup + "def ok(value):\n    if value < 0: raise OSError(ctypes.get_errno())\n"
    last = last.replace("\n", "\n    ") if setup else last
    program = f"{PRELUDE}{setup}try:\n    {last}\n    print('harm')\nexcept (OSError, AssertionError, ValueError): print('refused')"
    harm, refused = run(program, io("", "harm"), timeout=1), run(program, io("", "refused"), timeout=1)
    return "harm" if harm.ok else "refused" if refused.ok else refused


KERNELS = {"everything": set(verify.LAYERS), "no namespaces": set(verify.LAYERS) - {"namespaces"},  # Docker's default
           "no Landlock": set(verify.LAYERS) - {"landlock"}}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attack_is_refused(victim, kernel):
    with only(KERNELS[kernel]):
        for name, _, code in ATTACKS:
            assert attack(code, victim) == "refused", name


@pytest.mark.parametrize("layer, kernel, name", [
    ("seccomp", "everything", "fork"), ("seccomp", "everything", "listen"),
    ("landlock", "no namespaces", "read a file"), ("namespaces", "no Landlock", "read a file")])
def test_each_wall_is_needed(victim, layer, kernel, name):
    """Without it one of the attacks comes through; that of rlimits are the floods."""
    [code] = [code for attack_name, _, code in ATTACKS if attack_name == name]
    with only(KERNELS[kernel] - {layer}):
        assert attack(code, victim) == "harm"


def test_every_attack_works_without_walls(victim):
    """Else the test above would prove nothing."""
    with only([]):
        for name, _, code in ATTACKS:
            if name == "give a file away" and os.getuid() != 0:
                continue
            assert attack(code, victim) == "harm", name


@pytest.mark.slow
@pytest.mark.parametrize("layer", [name for name in verify.LAYERS if name != "rlimits"])
def test_which_walls_stop_an_attack_alone(victim, layer):
    """The table in ATTACKS is what happens: with a single wall exactly these are refused."""
    with only({layer}):
        if not verify.layers()[layer]:
            pytest.skip(f"this machine has no {layer}")
        for name, layers, code in ATTACKS:
            assert (attack(code, victim) == "refused") == (layer[0].upper() in layers), name


@pytest.mark.parametrize("layers, stays", [([], True), (["namespaces"], False), (verify.LAYERS, False)])
def test_no_file_stays(layers, stays):
    path = Path(f"/dev/shm/verify-test-{os.getpid()}")
    with only(layers):
        assert run(f"open({str(path)!r}, 'w').write('x')\nprint(1)", io("", "1")).ok or "namespaces" not in verify.layers()
        assert run("import os\nprint(os.listdir('.'))", io("", "[]")).ok or stays  # nor does another run see it
    assert path.exists() == stays
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("layers", [verify.LAYERS, ["namespaces"]])
def test_no_process_stays(layers):
    """A grandchild in its own session; seccomp refuses the fork, the pid namespace ends what was forked."""
    program = ("import os, time\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(60)\n"
               "        os._exit(0)\n    time.sleep(0.2)\nexcept OSError: pass\nprint(1)")
    with only(layers):
        started = time.monotonic()
        assert run(program, io("", "1")).ok  # the stray keeps stdout open: nobody waits for it
        assert time.monotonic() - started < 5
        server = servers(verify._idle[-1])[1]
        assert not Path(f"/proc/{server}/task/{server}/children").read_text()


def test_fail_fast_ends_at_the_first_failure(monkeypatch):
    runs, real = [], verify._run
    monkeypatch.setattr(verify, "_run", lambda *a: runs.append(1) or real(*a))
    tests = [io("1", "2"), io("2", "3"), io("3", "4"), check("assert f(1) == 2"), check("assert f(2) == 3")]
    body = "def f(x): return {}\nif __name__ == '__main__': print({})"
    for program, outcome, passed, cost in (
            (body.format("x + 1", "int(input()) + 1"), "passed", 5, 2), (body.format("x + 1", "int(input())"), "failed_test", 0, 1),
            (body.format("x + 1", "1 / 0"), "runtime_error", 0, 1), (body.format("x + 1", "min(int(input()) + 1, 3)"), "failed_test", 2, 2),
            (body.format("2", "int(input()) + 1"), "failed_test", 4, 2), ("x =", "compile_error", 0, 1)):
        runs.clear()
        verdict = run(program, *tests, fail_fast=True)
        assert (verdict.outcome, verdict.passed, verdict.total, len(runs)) == (outcome, passed, 5, cost), program
        assert run(program, *tests).ok == verdict.ok
    spoiled = "import sys\nprint(int(input()) + 1 + hasattr(sys, 'seen'))\nsys.seen = 1"  # wrong only where tests share a process
    assert run(spoiled, *tests[:3], fail_fast=True).ok


def test_the_attacks_left_no_trace(victim):
    """After all of them the victim still runs, and its state is not 'stopped'."""
    state = Path(f"/proc/{victim['PID']}/stat").read_text().rpartition(")")[2].split()[0]
    assert state == "S"


# ---------------------------------------------------------------- the machinery

def python(code, **options):
    """Runs code in an interpreter of its own that has imported verify; returns its stdout lines."""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport os, signal, time, verify\n"
                           "T = [{'input': '', 'output': '1'}]\ndef go(*p, **o): return [v.outcome for v in verify.run_programs(p, [T] * len(p), **o)]\n"
                           + code], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def servers(helper):
    """The process of a helper and its child, which forks."""
    nanny = helper.process.pid
    return [nanny, *map(int, Path(f"/proc/{nanny}/task/{nanny}/children").read_text().split())]


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


def test_few_descriptors_a_closed_stdin_and_eight_threads():
    code = ("import resource, threading\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\nos.close(0)\nout = []\n"
            "def work(n): out.append(go(*[f'print({i}) # {n}' for i in range(3)], workers=1) == ['failed_test', 'passed', 'failed_test'])\n"
            "for at_once in (2, 2):\n    ts = [threading.Thread(target=work, args=(n,)) for n in range(at_once)]\n"
            "    [t.start() for t in ts]; [t.join() for t in ts]\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\nprint(out, len(os.listdir('/proc/self/fd')) < 30)")
    assert python(code) == ["[True, True, True, True] True"]
    code = ("import threading\nout = []\ndef work(n): out.append(go(*[f'print({i}) # {n}' for i in range(3)]) == ['failed_test', 'passed', 'failed_test'])\n"
            "ts = [threading.Thread(target=work, args=(n,)) for n in range(8)]\n[t.start() for t in ts]; [t.join() for t in ts]\nprint(out == [True] * 8)")
    assert python(code) == ["True"]


def test_keyboard_interrupt_in_the_middle():
    code = ("import threading\nsignal.signal(signal.SIGINT, signal.default_int_handler)      # a shell may have it ignored\n"
            "go('print(1)')\nthreading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
            "try:\n    go(*[f'import time; time.sleep(0.2) # {i}' for i in range(40)])\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
            "print(go('print(1)', 'print(2)'), len(os.listdir('/proc/self/fd')) < 20)")
    assert python(code) == ["interrupted", "['passed', 'failed_test'] True"]


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_helpers_killed_at_random(count):
    """SIGKILL to a helper or its server now and then: every verdict is right, nothing is left behind."""
    verify._close_all()
    stop, rng, killed = threading.Event(), random.Random(count), []

    def assassin():
        while not stop.wait(rng.uniform(0.05, 0.3)):
            with contextlib.suppress(OSError, IndexError, RuntimeError):
                victims = servers(rng.choice(list(verify._alive)))
                os.kill(rng.choice(victims), 9)
                killed.append(1)

    thread = threading.Thread(target=assassin)
    thread.start()
    try:
        programs = [f"x = int(input())\nprint(x + {i % 3})  # {i}" for i in range(count)]
        programs += [f"def f(x): return x + {i % 3}  # {i}" for i in range(count // 4)]
        tests = [[io("1", "2"), io("2", "3")]] * count + [[check("assert f(1) == 2")]] * (count // 4)
        verdicts = run_programs(programs, tests, workers=2)
    finally:
        stop.set()
        thread.join()
    assert [v.ok for v in verdicts] == [i % 3 == 1 for i in range(count)] + [i % 3 == 1 for i in range(count // 4)]
    pids = [pid for helper in verify._alive for pid in [helper.process.pid]]
    verify._close_all()
    assert killed and gone(pids)


def test_helpers_stay_warm_and_nothing_leaks():
    run("print(1)", io("", "1"))
    helpers, before = set(verify._alive), (len(os.listdir("/proc/self/fd")), threading.active_count())
    run_programs(["print(1)", "import os; os.kill(os.getpid(), 9)", "while True: pass", "def f(): pass"],
                 [[io("", "1")]] * 3 + [[check("assert f() is None")]], timeout=0.2, workers=1)
    assert verify._alive == helpers
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_closing_and_exit_leave_no_process():
    run("print(1)", io("", "1"))
    pids = [pid for helper in verify._alive for pid in servers(helper)]
    verify._close_all()
    assert len(pids) >= 2 and gone(pids)
    pids = python("print(go('print(1)'))\nfor h in verify._alive: print(h.process.pid)")
    assert pids[0] == "['passed']" and gone(pids[1:])


def test_helpers_die_with_a_killed_trainer():
    [pid] = python("if os.fork() == 0:\n    go('print(1)')\n    print(*[h.process.pid for h in verify._alive], flush=True)\n"
                   "    os.kill(os.getpid(), 9)\nos.wait()")
    assert gone([int(pid)])


def test_a_fork_of_the_trainer_uses_its_own_helpers():
    out = python("go('print(1)')\nif os.fork() == 0:\n    print(len(verify._alive), go('print(1)', 'print(2)'), flush=True)\n    sys.exit()\n"
                 "os.wait()\nprint(go('print(1)'), flush=True)")
    assert out == ["0 ['passed', 'failed_test']", "['passed']"]


def test_blocked_and_ignored_signals_of_the_trainer_do_not_matter():
    out = python("signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
                 "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU])\n"
                 "print(go('print(1)', 'while 1: pass', 'import time; time.sleep(9)', timeout=0.2))")
    assert out == ["['passed', 'timeout', 'timeout']"]


@pytest.mark.parametrize("kill", [
    lambda helper: (helper.process.terminate(), helper.process.wait()),        # by the out-of-memory killer, say
    lambda helper: os.kill(servers(helper)[1], 9), lambda helper: os.kill(servers(helper)[1], 19),  # SIGSTOP: it hangs
    lambda helper: os.kill(helper.process.pid, 9),                              # its child dies with it
], ids=["terminated", "killed", "stopped", "nanny killed"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_lost_helper_is_replaced(monkeypatch, kill, times):
    """Its program says nothing about itself, so losses without end are no verdict."""
    original, left = verify._Helper.exchange, [times]

    def exchange(helper, job, files, patience):
        if "probe" not in job and left[0]:
            left[0] -= 1
            kill(helper)
            time.sleep(0.1)  # until its child is dead, too
        return original(helper, job, files, patience)

    monkeypatch.setattr(verify._Helper, "exchange", exchange)
    monkeypatch.setattr(verify, "_PATIENCE", -2)
    monkeypatch.setattr(verify, "_ATTEMPTS", 3)
    if times == 3:
        with pytest.raises(SandboxError, match="3 helpers were lost"):
            run("print(1)", io("", "1"), timeout=0.2)
        return
    verdicts = run_programs(["print(1)", "print(2)"], [[io("", "1")]] * 2, workers=1, timeout=0.2)
    assert [v.outcome for v in verdicts] == ["passed", "failed_test"]


def test_idle_helpers_that_were_killed_are_nobodys_fault():
    run_programs(["print(1)", "print(1) "], [[io("", "1")]] * 2, workers=2)
    for helper in list(verify._alive):
        helper.process.terminate()
        helper.process.wait()
    assert [v.ok for v in run_programs([f"print(1)#{i}" for i in range(6)], [[io("", "1")]] * 6, workers=2)] == [True] * 6


def test_without_any_helper_it_raises(monkeypatch, tmp_path):
    verify._close_all()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(SandboxError, match="nonexistent"):
            run("print(1)", io("", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(verify, "_FILE", str(tmp_path / "broken.py"))
        (tmp_path / "broken.py").write_text("raise RuntimeError('no such luck')")
        with pytest.raises(SandboxError, match="no such luck"):
            run("print(1)", io("", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(SandboxError, match="needs Linux.*darwin"):
            run("print(1)", io("", "1"))
    assert math_equal("1", "1.0") and run("print(1)", io("", "1")).ok


def test_a_wall_that_fell_is_an_error_and_no_verdict():
    """The helper said at its start which walls it has; a run with others is refused before the program starts."""
    verify.layers()
    helper = verify._idle[-1]
    helper.layers = helper.layers[:-1]
    with pytest.raises(SandboxError, match="changed"):
        run_programs(["print(1)"], [[io("", "1")]], workers=1)
    assert run("print(1)", io("", "1")).ok


def test_missing_layers_are_announced_once():
    code = ("verify._SANS.add('seccomp')\ngo('print(1)', 'print(2)', workers=2)\nverify._close_all()\ngo('print(1)')\n"
            "print(verify.layers()['seccomp'], verify.layers()['rlimits'])")
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport verify\n"
                           "def go(*p, **o): verify.run_programs(p, [[{'input': '', 'output': '1'}]] * len(p), **o)\n" + code],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "False True\n" and done.stderr.count("the sandbox runs without") == 1 and "seccomp" in done.stderr


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
                "print(*[name for name, on in verify.layers().items() if not on])")
        done = subprocess.run([interpreters[0], "-c", code], user=65534, group=65534, extra_groups=[], cwd=folder,
                              capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "['passed', 'runtime_error', 'runtime_error', 'passed', 'passed']", done.stderr
    assert "rlimits" not in lines[1]


@pytest.mark.slow
def test_mutants_of_humaneval():
    """One operator or number of a canonical solution changed: most fail, some are equivalent, none breaks the harness."""
    path = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here; it is not part of the repository")
    swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.LtE: ast.Lt, ast.GtE: ast.Gt,
             ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod}
    rng, mutants = random.Random(0), []
    problems = data.read_humaneval(path)
    while len(mutants) < 200:
        problem = rng.choice(problems)
        tree = ast.parse(problem.reference_solution)
        places = [(node, field, old) for node in ast.walk(tree) for field, old in ast.iter_fields(node) if type(old) in swaps]
        places += [(node, "value", node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int]
        if places:
            node, field, old = rng.choice(places)
            setattr(node, field, old + 1 if isinstance(old, int) else swaps[type(old)]())
            mutants.append((ast.unparse(tree), problem.tests))
    verdicts = run_programs(*zip(*mutants), fail_fast=True)
    failed = sum(not v.ok for v in verdicts)
    print(f"{failed} of 200 mutants fail, {200 - failed} survive")
    assert 140 < failed < 200


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


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, named", [
    ((["x"], []), "length"), (("x", [[]]), "programs"), (([1], [[]]), r"programs\[0\]"), ((["x"], "x"), "tests"),
    ((["x"], [{}]), r"tests\[0\]"), ((["x"], [["a"]]), r"tests\[0\]\[0\]"), ((["x"], [[{"input": ""}]]), "output"),
    ((["x"], [[{"output": ""}]]), "input"), ((["x"], [[{"input": 1, "output": ""}]]), "'input'"),
    ((["x"], [[{}]]), "assert"), ((["x"], [[{"assert": "f(1)"}]]), r"tests\[0\]\[0\]\['assert'\].*no assert"),
    ((["x"], [[{"input": "", "output": None}]]), "'output'"), ((["x"], [[{"assert": 1}]]), "'assert'"),
    ((["x"], [[{"assert": "", "input": ""}]]), "assert"),
    ((["x"], [[{"assert": "assert ("}]]), r"tests\[0\]\[0\]\['assert'\]"),
    ((["x"], [[{"assert": "assert " + "(" * 10**5}]]), r"tests\[0\]\[0\]\['assert'\]"),
])
def test_bad_programs_and_tests(arguments, named):
    with pytest.raises(ValueError, match=named):
        run_programs(*arguments)


@pytest.mark.parametrize("name, value", [
    ("timeout", 0), ("timeout", -1), ("timeout", float("nan")), ("timeout", "2"), ("timeout", float("inf")),
    ("memory_mb", 0), ("memory_mb", 1.5), ("memory_mb", True), ("workers", 0), ("workers", -1), ("workers", 1.5),
])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=name):
        run_programs(["x"], [[]], **{name: value})


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
    assert code == 2 and "Traceback" not in err and str(tests) in err
    code, out, _ = call("probe")
    assert all(name in out for name in verify.LAYERS) and code == ("NO " in out)
