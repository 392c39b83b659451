"""Did it come out right?  The verifier of TraceLift: final answers of word problems, and programs against tests.

    extract_answer, math_equal     the last marked answer of a text, compared as an exact value
    code_blocks, extract_code      the fenced blocks of a completion that may be its program; the likeliest one
    check_tests                    refuses tests that cannot be judged, when a problem enters
    run_programs, exec_score       programs run in throw-away processes -> Verdict -> reward
    layers                         which walls of the sandbox this machine gives

    python verify.py PROGRAM.py TESTS.json | probe        standard library only; programs need Linux on x86_64

In RL the verifier is the reward, and what it wrongly accepts is what the planner learns.  Who trusts whom:

    trainer     starts helpers, decides         <- believes numbers and bytes: exit status, CPU time, stdout, the judge
      |  ^       compares stdout with outputs
      |  |  descriptors of nameless files: blocks, stdin, outputs, asserts, report
      v  |
    helper      clean, warm interpreter, forks  <- believed by the trainer; never reads those files
      |   `------------.
      v                v
    program <-JSON-> judge                      <- the judge believes of the program only plain values
    behind walls     behind the same walls, holds the asserts and no code of the program

The trainer, with its gigabytes, threads and CUDA, never forks.  Neither a helper nor a program forked from it ever
holds an expected value: there is nothing to steal, and no marker to forge; a pass needs right values and a normal end.
Several stdin tests are played in one process first, each with an output file of its own (_run_stdin says what that
decides).  The judge calls the program's functions, objects and methods by name; arguments and results cross as JSON.
Plain values arrive as such (None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, deque,
Decimal, Fraction, datetime; subclasses as their base, iterators as iterators), lists, dicts, sets and deques that a
call changed come back changed, and an object stays where it is: the judge has its number, can call it and read or set
its attributes, and refuses to compare it, so that an __eq__ that always agrees is never asked.

Threat model: programs written by a language model under reward pressure.  Stopped, by the LAYERS below: reading or
changing the user's files, environment and processes, signals, network, new processes, what outlives a run, floods of
output, memory, CPU and wall time.  A kernel without a layer runs with fewer, and says so on stderr.  NOT stopped: bugs
of the kernel, timing channels, reading the files of Python and of /usr/lib; a program may say that it failed when it
did not, and see the inputs of all its stdin tests.  Honest programs that need processes, sockets, more than 16 MB of
files or anything beyond the standard library are refused these, too.

Not checkable by asserts: whether two objects of the program are equal or of a class of it, and its own exception
classes; functions as arguments raise ValueError.  Helpers that a test takes from the program (HumanEval/32 calls its
`poly`) are what the program makes them.
"""
from __future__ import annotations

import ast
import atexit
import builtins
import collections
import ctypes
import datetime
import decimal
import functools
import gc
import itertools
import json
import operator
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

try:
    import fcntl
    import resource
    _libc = ctypes.CDLL(None)
except (ImportError, TypeError):  # Windows: only the answers work there
    fcntl = resource = _libc = None

# ---------------------------------------------------------------- answers

MAX_ANSWER = 4000  # characters of one answer; a longer one is no answer
MAX_DIGITS = 400   # of one number, and its largest exponent: bounds the big-integer arithmetic

# What announces an answer. #### also begins headings of Markdown, which have text below them.
_MARKER = re.compile(r"#+ *(?:final +)?answer\W*\n\s*|####[#\s]*|答案(?:是|为|為)?[\s:：]*"
                     r"|\banswer\**\s*(?:is\b|would be\b|should be\b|:|=)[\s:*]*", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\\(?:boxed|fbox)\s*\{(?:[.…\s]*|(?:your|the|final|\s)*answer\s*)\}", re.IGNORECASE)
_END = re.compile(r"(?<!Rs)\.(?:\s|$)|(?<=[A-Za-z])[!?](?:\s|$)|[\s(,]+(?:because|since)\b")
_LABEL = re.compile(r"\b(?:step|part|case|section|example|question|problem|method|equation|line)\s*#?\(?[0-9]+\)?"
                    r"|^\s*[0-9]+[.)]\s+(?=[A-Za-z])", re.IGNORECASE)
_OPTION = re.compile(r"(?i)(?:the\s+)?(?:(?:correct\s+)?(?:option|choice|letter|answer)\s*)?[(]?([A-Z])[).]?")
# A bullet, or a dash between blanks after a word: no minus sign.
_DASH = re.compile(r"(^|[^\W\d]{2}[:*]*\s|:)\s*[-\u2013\u2014\u2212\u2022*]\s+")
_HEDGE = re.compile(r"(?i)[\s,;&/-]*(?:(?:and|to)\b[\s$]*(?:[a-z] *= *)?)?|.*\b(?:or|maybe|perhaps|possibly)\b.*")

# [0-9] and not \d, which also matches the digits of every other script.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_SIGNED = r"\([-+]?[0-9]+(?:\.[0-9]+)?\)"
_NUMBER = re.compile(rf"(?<![\^_0-9.])(?<!\^-)(?:(?<![\w)\]}}])([-+])(\s*))?"
                     rf"(?:({_WHOLE})\s+(?={_WHOLE}\s*/))?({_DECIMAL}|{_SIGNED}(?=\s*/))"
                     rf"(?:\s*/\s*([-+]?{_DECIMAL}|{_SIGNED}))?(?:\s?%)?")

# Words beside a number are its unit if they are ordinary words of three letters or more, or among the short ones below.
# Those of _NOT_UNITS, Greek letters and products of letters make another number of it, and then it is none.
_NOT_UNITS = set("""
    hundred thousand million billion trillion quadrillion lakh crore bn mn tn bil mil mio myriad dozen gross half
    halve third quarter fourth fifth sixth seventh eighth ninth tenth eleventh twelfth twentieth thirteenth
    fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth thirtieth fortieth fiftieth sixtieth hundredth
    thousandth millionth billionth squared cubed factorial power root reciprocal inverse divided multiplied plus
    minus or not pi sqrt sin cos tan log ln exp mod choose infinity infinite negative below zero basis maybe perhaps
    possibly probably but otherwise except either neither nor without approximately approx roughly wrong incorrect
    undefined double triple twice thrice least most isn doesn wasn cannot never alpha beta gamma delta epsilon zeta
    eta theta iota kappa lambda mu nu xi omicron rho sigma tau upsilon phi chi psi omega""".split())
_HEDGES = set("about around nearly almost over under than between within".split())  # before a number
_LETTER_UNITS = set("m s g h L l".split())                  # alone, after a space; another letter may be a variable
_JOINED_UNITS = set("mm cm km mg kg ml mL in ft lb lbs oz hr hrs min mins sec mph kmh am pm".split())  # 5cm
_SMALL_WORDS = set("""
    ce is he we it of in on at by as an so if us to no be do go per the and she her his they there this that""".split())
_SHORT_WORDS = _JOINED_UNITS | _SMALL_WORDS | set("""kph rpm pcs yd yds mi sq cu gb mb kb tb ms ns kw kj kn mw hz rs usd
    eur gbp inr cny jpy kgs kms mls cds dvds tvs pt pts qt gal yr yrs tbsp tsp bc ad""".split())
_PRODUCT = re.compile(r"[a-d]+|[h-n]+|[p-t]+|[u-z]+|[^aeiouy]+")  # abc, xyz: three letters, yet no word
_CJK_NUMBER = re.compile(r"[十百千万萬亿億兆半打负負천만억](?![克米])")
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*(?:\^-?[1-3])?[!?]?")
# Who says one side of a line does not say another of it: 5 am is not 5 pm, nor are 5 km 5 m.
_RIVALS = [[set(side.split()) for side in line.split("|")] for line in """am | pm
    bc bce | ad ce
    loss lost lose deficit owe debt | profit gain gained earned surplus
    fewer less decrease decreased lower | more extra increase increased higher
    left | right
    north | south | east | west
    up | down
    above | below
    before | after
    early | late
    ahead | behind
    older | younger
    faster | slower
    taller longer | shorter
    heavier | lighter
    clockwise | counterclockwise anticlockwise
    odd | even
    celsius | fahrenheit | kelvin
    degree | radian rad
    mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre
    inch inche | ft foot feet | yd yard | mi mile | m meter metre | km kilometer kilometre | cm centimeter centimetre
    mg milligram | g gram | kg kilogram | lb pound | oz ounce | ton tonne
    ml milliliter millilitre | l liter litre | cup | pint | quart | gallon gal
    ms millisecond | sec second | min minute | h hr hour | day | week | month | yr year
    cent penny pence | dollar usd | euro eur | pound gbp | rupee inr | yen jpy | yuan cny 元""".split("\n")]



def _rules(table: str) -> list:
    """A line is a pattern, an arrow and what replaces it (␣ is a blank); ARGUMENT is one of a TeX command."""
    table = table.replace("ARGUMENT", r"\s*(?:\{([^{}]*)\}|([0-9]|SYMBOL))")
    table = table.replace("SYMBOL", "[A-Za-zπ∞θαβγφλμσω]")
    pairs = [line.strip().partition(" =>") for line in table.strip().split("\n")]
    return [(re.compile(pattern, re.DOTALL), new.strip().replace("␣", " ")) for pattern, _, new in pairs]


def _rewrite(text: str, rules: list) -> str:
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


# Signs and abbreviations as words. A dollar without a partner is money; two of them enclose a formula.
_SPOKEN = _rules(r"""
    \b([ap])\.\s?m\b => \1m
    \b([ab])\.\s?([cd])\b => \1\2
    \\\$|^\$(?=[^$]*$) => ␣dollar␣
    °\s?C\b => ␣celsius␣
    °\s?F\b => ␣fahrenheit␣
    € => ␣euro␣
    £ => ␣pound␣
    ₹ => ␣rupee␣
    [¥￥] => ␣yen␣""")
# One spelling for what TeX and Unicode spell in several ways, in this order; then from the innermost braces outwards.
_CHARACTERS = str.maketrans({
    **dict(zip("−–‒⁄∕×·⋅⩽⩾’⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "---//***≤≥'0123456789-0123456789")),
    **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}})  # full-width characters
_TYPOGRAPHY = _rules(r"""
    ([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+) => ^{\1}
    ([₀₁₂₃₄₅₆₇₈₉]+) => _{\1}
    ½ => ␣1/2␣
    ⅓ => ␣1/3␣
    ⅔ => ␣2/3␣
    ¼ => ␣1/4␣
    ¾ => ␣3/4␣
    ⅕ => ␣1/5␣
    ⅛ => ␣1/8␣
    \b([ap])\.\s?m\b => \1m
    (?:^|\s)~\s?(?=\$?[0-9]) => ␣≈
    ㎝ => cm
    ㎞ => km
    ㎏ => kg
    ㎡ => m^2
    \.{2,}|\\[lc]?dots(?![a-z]) => …
    \{,\}(?=[0-9]{3}) => ,
    (?<=[0-9A-Za-z)])\*\*(?=[0-9A-Za-z(]) => ^
    \\! =>
    \\% => %
    (?<=[0-9])(?:\\,|[\u00a0\u202f\u2006\u2009])(?=[0-9]{3}(?![0-9])) => ,
    \\begin\{([pb]?matrix)\}(.*?)\\end\{\1\} => ⎡\2⎤
    \\\\(?:\[\w*\])? => ⏎
    \\(?:\{|lbrace(?![a-z])) => ⦃
    \\(?:\}|rbrace(?![a-z])) => ⦄
    \\[()\[\]]|\*\*|(?<=-)\s*\\?[$€£¥₹]\s* =>
    \\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![A-Za-z])|\\?[$€£¥₹]|\\[,;:\s]|[~\s] => ␣
    [ ]+ => ␣
    \\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|[mh]box|operatorname|emph|underline)\s*\{((?:[^{}]|\{[^{}]*\})*)\} => ␣\1␣
    \\[dtc]frac(?![a-z]) => \\frac
    (?:\^\s*)?(?:\{\s*)?(?:\\(?:circ|degree)(?![a-z])|°)(?:\s*\})?(?:\s*[CF]\b)? => ␣degrees␣
    \\pi(?![a-z])|\bpi\b => π
    \\infty(?![a-z])|\binfinity\b => ∞
    \\sqrt(?![a-z])|\bsqrt\b => √
    \\(?:leq?|leqslant)(?![a-z])|<= => ≤
    \\(?:geq?|geqslant)(?![a-z])|>= => ≥
    \\neq?(?![a-z])|!= => ≠
    \\lt(?![a-z]) => <
    \\gt(?![a-z]) => >
    \\(?:emptyset|varnothing)(?![a-z]) => ∅
    \\angle(?![a-z]) => ∠
    \\(?:times|cdot)(?![a-z]) => *
    \\cup(?![a-z]) => ∪
    \\cap(?![a-z]) => ∩
    \\in(?![a-z]) => ∈
    \\pm(?![a-z]) => ±
    \\theta(?![a-z]) => θ
    \\alpha(?![a-z]) => α
    \\beta(?![a-z]) => β
    == => =
    \s+([\^_]) => \1
    (\\[A-Za-z]+|[}\]√])\s+(?=\{) => \1""")
_BRACES = _rules(r"""
    √\s*\[\s*(\w+)\s*\]ARGUMENT => √[\1](\2\3)
    √\s*(?:\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|SYMBOL)) => √(\1\2)
    ([\^_/√])\s*\\fracARGUMENTARGUMENT => \1((\2\3)/(\4\5))
    \\fracARGUMENTARGUMENT(?=\s*\^) => ((\1\2)/(\3\4))
    \\fracARGUMENTARGUMENT => ␣(\1\2)/(\3\4)␣
    ([\^_])\s*\{([^{}]*)\} => \1(\2)␣
    (\\(?!frac)[A-Za-z]+)\{([^{}]*)\} => \1(\2)
    ^\s*\{([^{},]*)\}\s*$ => \1
    (?<![A-Za-z\]}√^_])\{([^{}]*,[^{}]*)\} => ⦃\1⦄
    \{\s*⦃([^⦃⦄]*)⦄\s*\} => \1
    (?<![A-Za-z\]}√^_])\{([^{}]*)\}(?!\s*\{) => (\1)""")
_BRACKETS = _rules(r"""
    \(\s+ => (
    \s+\) => )
    (?<![\w√\])\\^_])\(((?:[^()+\-/,=±]|√\([^()]*\))+)\)/ => \1/
    /\(([0-9]+(?:\.[0-9]+)?|SYMBOL|√\([^()]*\))\) => /\1␣
    ([\^_])\((-?(?:[0-9]+(?:\.[0-9]+)?|SYMBOL))\) => \1\2␣
    (?<![0-9.,])(DECIMAL)\s*[*x]\s*10\s*\^\s*\(?([-+]?[0-9]+)\)? => \1e\2""".replace("DECIMAL", _DECIMAL))


def _require(value, kind, name: str, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {what}, not {type(value).__name__}")


def extract_answer(text: str) -> str | None:
    r"""The final answer of a solution, as written; None when there is none.  ValueError for what is no string.

    The last marker with a value wins: \boxed{x}, '#### x', 'answer is x', 'Answer: x' (to the end of the line or
    sentence); mere words after one ("the answer is reasonable") count only when no other has a value.  Without one it
    is the last number of the last line that is not empty, so a bare ' 24' works.  Guesses side by side ("3 or 4", two
    boxes in one sentence) come back as they stand, and equal no number.  What stands in <think>, or in a box that
    nothing closes, is no answer.  Time is linear in the text.
    """
    _require(text, str, "text", "a string")
    marked, cut = _marked(text)
    if marked is not None:
        return marked if len(marked) <= MAX_ANSWER else None
    if cut:
        return None
    line = _said(text).rstrip()[-MAX_ANSWER:].rpartition("\n")[2]
    return _last_number(_clean(_DASH.sub(r"\1 ", re.sub(r"<<[^<>]*>>", "", line))))


def _last_number(line: str) -> str | None:
    """The last number of a line; with what stands around it where that makes something else of it (2^3, 4 dozen)."""
    numbers = list(_NUMBER.finditer(line))[-2:]
    if not numbers:
        return None
    start, end = numbers[-1].span()
    if len(numbers) == 2 and _HEDGE.fullmatch(line, numbers[0].end(), start):
        return line[numbers[0].start():end]
    chunk = start - len(re.split(r"[\s=]|(?<![\w√\]])\(", line[:start])[-1])
    clause = re.split(r"[.;!?)](?:\s|$)|,\s|[。，；！？]", line[end:], maxsplit=1)[0]
    phrase = line[chunk:end] + re.match(r"\S*(?:\s+\S+){0,2}", clause).group()
    before = " ".join(line[:chunk].split()[-2:])
    if (_NOT_UNITS | _HEDGES) & _words(before):
        return f"{before} {phrase}"
    return numbers[-1].group().strip() if _phrase(phrase) else phrase


def math_equal(prediction: str | None, reference: str) -> bool:
    r"""Whether two final answers (or texts with a marked one) are the same value.  ValueError for what is no string.

    Numbers are exact rationals, without tolerance, also as fraction, mixed number or 1.5e3; a unit or currency is
    ignored unless the reference's contradicts it (_RIVALS), and percent is a unit (50% is 50, not 0.5).  Of a sentence
    with one number that number counts, of equations the last side: x = 5 is 5, but not y = 5.  (1, 2), [1, 2), {1, 2}
    and 1, 2 are four different things; only the braces ignore order.  All else is text in one spelling of TeX, compared
    without case: powers and roots are not evaluated, and "24 or 25" is not 24.  None, the empty text, and what is
    longer than MAX_ANSWER equal nothing.
    """
    _require(reference, str, "reference", "a string")
    _require(prediction, (str, type(None)), "prediction", "a string or None")
    values, words = [], []
    for text in (prediction or "", reference):
        marked, cut = _marked(text)
        text = marked or ("" if cut else text.strip())
        if not text or len(text) > MAX_ANSWER:
            return False
        values.append(_value(_clean(text)))
        words.append(_words(_rewrite(text, _SPOKEN)))
    return None not in values and not _contradict(*words) and _agree(*values)


def _said(text: str) -> str:
    """What follows the last closed thought."""
    return re.split(r"</think\w*>", text)[-1]


def _marked(text: str) -> tuple[str | None, bool]:
    """The marked answer of a text, and whether the text ends in a thought or a box that nothing closes."""
    text, thinks, _ = _PLACEHOLDER.sub("", _said(text)).partition("<think")
    text = re.sub(r"(\\boxed|\\fbox)(?:\s*([0-9][0-9.,/]*)|\s+([A-Za-z])(?![A-Za-z]))", r"\1{\2\3}", text)
    boxes = [(-1, -1), (-1, -1)]  # where the contents of the last two start and end
    opened = []  # per open brace: where its content starts, or -1 for a brace that is not a box
    # One pass over all braces: a scan per \boxed is quadratic on nested ones.
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\?[{}]", text):
        brace = match.group()
        if brace == "}" and opened:
            box = opened.pop(), match.start()
            if box[0] > boxes[-1][0]:
                # Boxes side by side may be two answers, nested ones are one.
                boxes = [boxes[-1] if box[0] > boxes[-1][1] else boxes[0], box]
        elif brace[-1] == "{" and brace != r"\{":
            opened.append(-1 if brace == "{" else match.end())
    start, end = boxes[-1]
    unclosed = [place for place in opened if place > end]
    if unclosed:
        text = text[:text.rfind("\\", 0, unclosed[0])]
    cut = bool(thinks or unclosed)
    found = None
    for match in list(_MARKER.finditer(text, max(end, 0)))[:-20:-1]:  # no more: each costs a line
        line, _, below = text[match.end():match.end() + MAX_ANSWER + 1].partition("\n")
        line = _LABEL.sub("", _END.split(_DASH.sub(r"\1 ", line), maxsplit=1)[0]).strip(" \t\r*`_")
        formula = re.fullmatch(r"([^0-9$]*)\$([^$]+)\$([^0-9$]*)", line)
        if formula and not (_NOT_UNITS | _HEDGES) & _words(formula[1]):
            return formula[2] + formula[3], cut
        if re.search(r"[0-9½⅓¼√π∞=]|\\(?!text|math|mbox)[A-Za-z]", line) or _OPTION.fullmatch(line.strip(" $\\()*.")):
            return line, cut
        if not (match.group().startswith("#") and below.strip()):
            found = found or line or None  # words
    if start < 0:
        return found, cut
    first, content = (re.sub(r"^\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}$", r"\1", text[a:b].strip()) for a, b in boxes)
    between = text[boxes[0][1] + 1:start][:MAX_ANSWER]
    if boxes[0][0] >= 0 and not re.search(r"\n|[.!?]\s", between.strip()) and not _MARKER.search(between):
        return content if first == content else f"{first} or {content}", cut
    # \boxed{Answer: 24}; no deeper, for the last box holds no other box
    return _marked(re.sub(r"\\text\{([^{}]*)\}", r"\1", content[:MAX_ANSWER + 1]))[0] or content, cut


def _clean(text: str) -> str:
    r"""One spelling: no typography, currency or layout; \frac{a}{b} is a/b, \sqrt3 is √(3), x^{2} is x^2, \leq is ≤."""
    text = _rewrite(text, _TYPOGRAPHY).translate(_CHARACTERS)
    for _ in range(8):
        before, text = text, _rewrite(text, _BRACES)
        if text == before:
            break
    text = _rewrite(text, _BRACKETS)
    return text.lstrip(" *`'\"").rstrip(" *`'\".,;:")


def _words(text: str) -> set[str]:
    """The words of a text without case, and each without the s of a plural."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return {*words, *(word.rstrip("s") for word in words)}


def _contradict(said: set[str], wanted: set[str]) -> bool:
    for sides in _RIVALS:
        ours = [bool(side & said) for side in sides]
        theirs = [bool(side & wanted) for side in sides]
        if any(ours) and any(theirs) and not any(map(operator.and_, ours, theirs)):
            return True
    return False


class _Answer(NamedTuple):
    """value: Fraction, frozenset for {...}, tuple for other brackets and bare lists, else text; name: x of x = 5;
    words: of a sentence around the value, which a prediction must have if the reference has them."""

    value: object
    name: str = ""
    words: frozenset = frozenset()


def _agree(said: _Answer, wanted: _Answer) -> bool:
    ours, theirs = said.value, wanted.value
    if said.name and wanted.name not in ("", said.name) or not wanted.words <= said.words:
        return False
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        return all(map(_agree, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def _value(text: str, depth: int = 0) -> _Answer | None:
    text = text.strip()
    found = _phrase(text)
    if not text or depth > 4 or found and not found.words:
        return found
    bracket, inside = text[0] + text[-1], text[1:-1]
    if bracket == "⎡⎤":
        rows = [f"[{row.replace('&', ',')}]" for row in inside.strip(" ⏎").split("⏎")]
        inside, bracket = ",".join(rows), "matrix"
    parts = _split(inside) if bracket in ("()", "[]", "(]", "[)", "⦃⦄", "matrix") else None
    if parts is None:
        bracket, parts = "", _split(text) or [text]
    if found and (not bracket or len(parts) == 1):
        return found
    if not bracket and len(parts) == 1:
        return _equation(text, depth) or _Answer(_as_text(text))
    values = [_value(part, depth + 1) for part in parts]
    if None in values:
        return _Answer(_as_text(text))
    if bracket == "⦃⦄":
        return _Answer(frozenset(value.value for value in values))
    return values[0] if bracket == "()" and len(values) == 1 else _Answer((_Answer(bracket), *values))


def _equation(text: str, depth: int) -> _Answer | None:
    """Of x = 2 * 3 = 6 the last side, if the first is a name, a sum of names or plain arithmetic."""
    first, *others = re.split("[=∈]", text)
    if not others or re.search("[<>≤≥≠≈]", text):
        return None
    name = _as_text(first)
    named = re.fullmatch(r"∠?[^\W\d_][\w' ]*(?:\([^()=]*\))?(?:\+[^\W\d_]\w*)*|\([^\W\d](?:,[^\W\d])*\)|", name)
    arithmetic = re.fullmatch(r"(?:[0-9\s.,+*/()%÷-]|x(?= ?[0-9]))*", re.sub(r"[A-Za-z]{3,}", "", name))
    last = _value(others[-1], depth + 1) if named or arithmetic else None
    return last and last._replace(name=name if named else "")


def _as_text(text: str) -> str:
    option = _OPTION.fullmatch(text)
    text = " ".join((option[1] if option else text).casefold().split())
    text = re.sub(r"\s*(\W|[π∞])\s*", r"\1", text)
    text = re.sub(r"(?<=[0-9]) (?=[a-z](?![a-z]))", "", text)
    # A unit after an expression is ignored, as after a number.
    match = re.fullmatch(r"([-(√0-9].*?[0-9)π]) ?([^\W\d_]{2}.*)", text)
    return match[1] if match and _are_units(match[2].split()) else text


def _split(text: str) -> list[str] | None:
    """The parts between the commas (or 'and') that no bracket encloses; None where brackets do not match, or for no
    text."""
    parts, depth = [""], 0
    for piece in re.split(r"(,?\s+and\s+|[\[\](){},;⦃⦄⎡⎤])", text):
        depth += (piece in tuple("[({⦃⎡")) - (piece in tuple("])}⦄⎤"))
        if depth < 0:
            return None
        if depth == 0 and re.fullmatch(r"[,;]|,?\s+and\s+", piece):
            parts.append("")
        else:
            parts[-1] += piece
    return parts if depth == 0 and text.strip() else None


def _phrase(text: str) -> _Answer | None:
    """The one number of a text that otherwise holds but words: its unit after it, perhaps a sentence around it."""
    number = _NUMBER.search(text)
    value = number and _rational(number)
    if value is None or _NUMBER.search(text, number.end()):
        return None
    lead, after = text[:number.start()], text[number.end():]
    before = re.findall(r"[^\s,.:;()\"]+", lead)
    # x3, f(3; "x 3"; "Total - 3", where the dash is no minus sign
    if re.search(r"[\w^/()\[]$|\^", lead) or before and (number[2] or before[-1] not in "aI" and len(before[-1]) == 1):
        return None
    if _HEDGES & _words(lead) or not _are_units([word for word in before if len(word) > 1]):
        return None
    joined = re.match(r"[A-Za-z]+", after)  # 2x is no number
    if joined and joined.group() not in _JOINED_UNITS or re.match(r"[(\[^_'\"]|\.\S", after):
        return None
    unit, _, remark = after.partition(",")
    units, others = (re.findall(r"[^\s,.:;()\"/]*[^\s,.:;()\"/-][^\s,.:;()\"/]*", part) for part in (unit, remark))
    found = units + others
    if number[2] and found:  # "- 24 apples" may be a bullet
        return None
    if not _are_units([word for word in found if word != "a" or len(found) == 1]):
        return None
    if not before and after.strip() in _SMALL_WORDS - _JOINED_UNITS:  # 2 as: a product, no unit
        return None
    words = {word.casefold() for word in before + others} - {"usd", "us", "eur", "gbp", "inr", "cny", "jpy", "rs"}
    return _Answer(value, words=frozenset(words))


def _are_units(words: list[str]) -> bool:
    for word in words:
        name = re.match(r"[^\W\d_]*", word).group()
        if not _WORD.fullmatch(word) or _NOT_UNITS & _words(word) or re.search("[\u0370-\u03ff]", word):
            return False
        if name > "\u2e80":  # no blanks between these words
            if _CJK_NUMBER.search(word):
                return False
        elif name not in _LETTER_UNITS and name.casefold() not in _SHORT_WORDS:
            if len(name) < 3 or len(name) < 5 and _PRODUCT.fullmatch(name.casefold()):
                return False
    return True


def _rational(match) -> Fraction | None:
    value, divisor, whole = _fraction(match[4]), _fraction(match[5] or "1"), _fraction(match[3] or "0")
    if None in (value, divisor, whole) or divisor == 0 or whole and not value < divisor:  # 1 3/2 is no mixed number
        return None
    return (whole + value / divisor) * (-1 if match[1] == "-" else 1)


def _fraction(decimal: str) -> Fraction | None:
    mantissa, _, exponent = decimal.replace(",", "").strip("()").lower().partition("e")
    if sum(map(str.isdigit, mantissa)) > MAX_DIGITS or len(exponent) > 9 or abs(int(exponent or 0)) > MAX_DIGITS:
        return None
    return Fraction(f"{mantissa}e{exponent or 0}")


# ---------------------------------------------------------------- programs and scores

_TOGETHER = 16  # stdin tests in one process, at most
OUTCOMES = ("compile_error", "timeout", "memory", "runtime_error", "failed_test", "passed", "no_tests")  # worst first
LAYERS = {  # what each wall of the sandbox stops, and what it needs
    "rlimits": ("endless CPU, big memory, floods of output, many files", "any Linux"),
    "seccomp": ("processes, signals, sockets, ptrace, chmod; all calls but some 120", "x86_64"),
    "landlock": ("the user's files, /proc", "Linux 5.13"),
    "namespaces": ("the same by a root of its own; each run gets 16 MB in /dev/shm, else it can write nowhere",
                   "user namespaces allowed"),
}
_SANS: set[str] = set()  # layers to leave out, for tests
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)$")
_PYTHON = re.compile(r"\W*(?:[\w/.]*\.py|i?python[0-9.]*|py[0-9.]*)(?![-\w])", re.IGNORECASE)
# Code on the fence's own line: no name of a language and no attribute.
_CODE = re.compile(r"""(?!(?:title|file|filename|name|linenums|lines|hl_lines|highlight|class|id)=)
    (?:(?:import|from|def|class|for|while|if|with|try|return|print|async)\b.*[\s(:] | @\w
    | [A-Za-z_][\w.\[\]]*\s*[(=])""", re.VERBOSE)
# Plainly an output, a session or a shell's: by the line before the block, or by its own first line.
_TITLE = re.compile(r"""[\W_]*(?:(?:expected|sample|example|the|program|console|your)\s+)*
    (?:output|result|input|terminal|prints?|shell)s?(?:\ is|\ will\ be|\ looks\ like)?[\W_]*$""", re.IGNORECASE | re.VERBOSE)
_OUTPUT = re.compile(r"""\s*(?:\#[^\n]*\n\s*)*(?:>>>|\$\s|Traceback|pip3?\ |python3?\ |bash\ |cd\ |\|
    |(?:[-+]?[0-9.]+(?:[\ ,]+[-+]?[0-9.]+)*|True|False|None|'[^'=\n]*'|"[^"=\n]*"|[\[({][^=\n]*[\])}])\s*(?:$|\n)
    |(?!(?:import|from|def|class|return|global|nonlocal|del|assert|raise|async|with|while|if|for|print|yield|lambda)\b)
     [A-Za-z]+:?(?:\ +[\w:,.!]+)+\s*(?:$|\n))""", re.VERBOSE)
_DEFINES = re.compile(r"^(?:async\s+def|def|class)\s+(\w+)", re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    """The fenced blocks (``` or ~~~; unclosed: to the end) that may be the program, in their order, never none: those
    tagged as Python and those without a tag that are not plainly an output or a shell's; else the last one; else the
    text.  CRLF becomes LF.  ValueError for what is no string.

    A lone fence after the code, as when the prompt had opened the block, ends the code.  Code may begin on the line of
    the fence, and the closing fence may follow the last character.
    """
    _require(text, str, "text", "a string")
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    if text.lstrip().startswith("<think"):
        text = _said(text) if "</think" in text else ""
    text = re.sub(r"(?m)^([^`\n]*[^`\s]|[ \t]*```[^`\n]+)[ \t]*(```)[ \t]*$", r"\1\n\2", text)
    blocks, fence, body, outside, tagged = [], None, [], [""], False
    for line in (text + "\n\0").split("\n"):  # \0: the end, which closes a block
        match = _FENCE.match(line)
        if fence is None:
            fence, body = match, []
            if match is None:
                outside.append(line)
        elif line == "\0" or match and match[2].startswith(fence[2]) and not match[3].strip():
            info = fence[3].strip()
            python = _PYTHON.match(info)
            first = info[python.end():].strip() if python else info
            code = "\n".join([first] * bool(_CODE.match(first)) + body)
            untagged = not info or not python and _CODE.match(info)
            title = next((above for above in reversed(outside) if above.strip()), "")
            tagged = tagged or bool(python)
            bare = tagged and not re.search(r"[=(:]|\bimport\b", code)  # a word after a block tagged as Python
            likely = python or untagged and not bare and not _OUTPUT.match(code) and not _TITLE.match(title)
            if line != "\0" or code.strip():
                blocks.append((bool(likely), code))
            fence = None
        else:  # in a list item the block is indented with its fence
            body.append(line.removeprefix(fence[1]))
    text = "\n".join(outside[1:]).removesuffix("\n\0")
    code = [block for likely, block in blocks if likely] or [block for _, block in blocks[-1:]] or [text]
    return [block.lstrip("\ufeff") for block in code]


def extract_code(text: str) -> str:
    """The program of a completion: the last of its code_blocks, but for a last one that only shows how to call what an
    earlier one defines.  Where tests ask for a name, run_programs chooses better, given all of code_blocks(text)."""
    blocks = code_blocks(text)
    used = set(re.findall(r"\b(\w+)\s*\(", blocks[-1]))
    for block in reversed(blocks[:-1]):
        if not _DEFINES.search(blocks[-1]) and used.intersection(_DEFINES.findall(block)):
            return block
    return blocks[-1]


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


def run_programs(programs: list[str | list[str]], tests: list[list[dict]], *, timeout: float = 2.0,
                 memory_mb: int = 1024, workers: int | None = None, fail_fast: bool = False) -> list[Verdict]:
    """Runs programs[i] against tests[i]; one Verdict per program, in the same order.  Safe to call from threads.

    programs   the text of each; or all its blocks (code_blocks), of which the last that defines what the asserts ask
               for is the program.  The standard library is all that it can import: no numpy, no site-packages.
    tests      {"input", "output"}: a run with that stdin, whose stdout must have the same whitespace-separated tokens
               and which must end normally; {"assert"}: statements with an assert, which see the program's names,
               a few modules (MODULES) and their own; all of one program share one run, in which it is not __main__.
               What expects nothing (a blank output, an assert that asks the program nothing) does not count.
    timeout    CPU seconds per run decide; wall time gets 4 * timeout + 2.  No test is run after a timeout.
    memory_mb  address space in MiB, about 40 of which are the interpreter's
    workers    helpers at a time; default: one per core, of which processes that torchrun has started on this machine
               have an equal share.  Equal jobs are run once.
    fail_fast  the first failed test ends a program: right where only Verdict.ok counts, and faster
    Raises ValueError naming the argument or test, SandboxError when no helper can be started.
    """
    jobs = _check(programs, tests, timeout, memory_mb, workers)
    limits = {"timeout": timeout, "wall": 4 * timeout + 2, "memory_mb": memory_mb, "fail_fast": bool(fail_fast)}
    first = {}
    for i, job in enumerate(jobs):
        first.setdefault(job, i)
    if first:
        from concurrent.futures import ThreadPoolExecutor  # here: helpers are lighter without
        with ThreadPoolExecutor(min(workers or _cores(), len(first))) as pool:
            verdicts = pool.map(lambda job: _judge(*job, limits, f"tests[{first[job]}]"), first)
            first = dict(zip(first, verdicts))
    return [first[job] for job in jobs]


def layers() -> dict[str, bool]:
    """Which LAYERS of the sandbox are active on this machine; starts a helper when none is running.  SandboxError."""
    helper = _take()
    _idle.append(helper)
    return {name: name in helper.layers for name in LAYERS}


def check_tests(tests: list[dict], where: str = "tests") -> None:
    """Refuses the tests of one problem that run_programs could not judge, when the problem enters.  ValueError names
    the test: a wrong type or key, no valid Python, no assert or none that ever runs, a module beyond the standard
    library, and what would run code that a program returned (exec, compile, __import__, pickle)."""
    _require(tests, (list, tuple), where, "a list of tests")
    for j, test in enumerate(tests):
        here = f"{where}[{j}]"
        _require(test, dict, here, "a dict")
        keys = sorted(test.keys() & {"assert", "input", "output"})
        if keys not in (["assert"], ["input", "output"]):
            has = f"it has {list(test)}"
            raise ValueError(f"{here} must have the key 'assert', or the keys 'input' and 'output'; {has}")
        for key in keys:
            _require(test[key], str, f"{here}[{key!r}]", "a string")
        try:
            _names(test.get("assert", "").strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{here}['assert'] is not a Python statement that asserts: {error}") from None


def _cores() -> int:
    """Cores of this process: torchrun says how many share the machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _check(programs, tests, timeout, memory_mb, workers) -> list[tuple]:
    """The jobs: (blocks, ((input, output), ...), ((statement, names to ask the program for, its place), ...))."""
    def need(condition, message: str) -> None:
        if not condition:
            raise ValueError(message)

    _require(programs, (list, tuple), "programs", "a list of strings")
    _require(tests, (list, tuple), "tests", "a list of lists")
    need(len(programs) == len(tests), f"programs and tests differ in length: {len(programs)} and {len(tests)}")
    need(isinstance(timeout, (int, float)) and 0 < timeout < 1e6, f"timeout must be positive seconds, not {timeout!r}")
    need(type(memory_mb) is int and memory_mb >= 64, f"memory_mb must be an integer from 64 up, not {memory_mb!r}")
    need(workers is None or type(workers) is int and workers > 0, f"workers must be 1 or more, not {workers!r}")
    jobs = []
    for i, (program, own) in enumerate(zip(programs, tests)):
        blocks = (program,) if isinstance(program, str) else program
        _require(blocks, (list, tuple), f"programs[{i}]", "a string or the list of its blocks")
        for block in blocks or [None]:
            _require(block, str, f"programs[{i}]", "a string or the list of its blocks")
        check_tests(own, f"tests[{i}]")
        statements = [(test.get("assert", "").strip(), j) for j, test in enumerate(own)]
        asserts = tuple((statement, _names(statement), j) for statement, j in statements if _names(statement))
        stdin = tuple((test["input"], test["output"]) for test in own if test.get("output", "").strip())
        jobs.append((tuple(blocks), stdin, asserts))
    return jobs


_MODULES_THAT_RUN_CODE = set("pickle marshal shelve importlib builtins subprocess ctypes runpy code timeit".split())


@functools.lru_cache(4096)  # each program of a group has the same tests
def _names(statement: str) -> tuple[str, ...]:
    """The names that a test must take from the program: those that it does not bind and that are not known here.

    Known names (abs, sorted, math, ...) are the judge's own, or a program could define an `abs` that agrees.  Only a
    test that names nothing else (MBPP: assert sum(10, 15) == 25) takes the first known one that it calls.
    ValueError and SyntaxError for what can be no test.
    """
    if not statement:
        return ()
    tree = ast.parse(statement)
    kinds = {}
    for node in ast.walk(tree):
        kinds.setdefault(type(node), []).append(node)
    if not any(isinstance(node, ast.Assert) for node in _live(tree)):
        raise ValueError(f"no assert{' that runs' * (ast.Assert in kinds)} in {statement[:80]!r}")
    aliases, calls = kinds.get(ast.alias, []), kinds.get(ast.Call, [])
    constant = [call for call in calls if all(isinstance(argument, ast.Constant) for argument in call.args)]
    imported = [alias.name for node in kinds.get(ast.Import, []) for alias in node.names]
    imported += [node.module or "." for node in kinds.get(ast.ImportFrom, [])]
    named = [call for call in constant if call.args and getattr(call.func, "id", "") == "__import__"]
    imported += [str(call.args[0].value) for call in named]
    for module in (name.partition(".")[0] for name in imported):
        if module not in sys.stdlib_module_names:
            raise ValueError(f"no {module!r}: the standard library is all that programs and tests have")
        if module in _MODULES_THAT_RUN_CODE:
            raise ValueError(f"with {module} it might run what a program returned")
    names = kinds.get(ast.Name, [])
    loaded = [node.id for node in names if isinstance(node.ctx, ast.Load)]
    harmless = [call.func for call in constant]
    for node in names:
        if node.id in ("exec", "compile", "__import__") and node not in harmless:
            raise ValueError(f"with {node.id} it might run what a program returned")
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in kinds.get(ast.arg, [])}
    for kind in (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler):
        bound |= {node.name for node in kinds.get(kind, [])}
    bound |= {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
    known = bound.union(dir(builtins), MODULES)
    called = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    return (tuple(dict.fromkeys(name for name in loaded if name not in known))
            or tuple(name for name in called if name not in bound)[:1])


def _live(tree: ast.Module) -> list:
    """The nodes that may run: all but the bodies of functions that no running one names."""
    live, waiting, asleep = [], [tree], []
    while waiting:
        node = waiting.pop()
        live.append(node)
        for child in ast.iter_child_nodes(node):
            (asleep if isinstance(child, ast.FunctionDef) else waiting).append(child)
        if not waiting:
            named = {getattr(node, "id", None) or getattr(node, "attr", None) for node in live}
            waiting = [function for function in asleep if function.name in named]
            asleep = [function for function in asleep if function.name not in named]
    return live


def _judge(blocks: tuple, stdin_tests: tuple, asserts: tuple, limits: dict, where: str) -> Verdict:
    total = len(stdin_tests) + len(asserts)
    if total == 0:
        return Verdict("no_tests", 0, 0, "no test expects anything")
    results = _run_stdin(blocks, stdin_tests, limits)  # (outcome, detail) per test
    if asserts and not _is_over(results, len(stdin_tests), limits):
        results += _run_asserts(blocks, asserts, limits, where)
    outcomes = [outcome for outcome, _ in results]
    worst = min(outcomes, key=OUTCOMES.index)
    first = outcomes.index(worst)
    detail = "" if worst == "passed" else f"test {first + 1} of {total}: {results[first][1]}"
    return Verdict(worst, outcomes.count("passed"), total, detail)


def _is_over(results: list, wanted: int, limits: dict) -> bool:
    """Whether the other tests need not run: after a timeout they would only cost the same again."""
    if len(results) < wanted:
        return True
    last = results[-1][0] if results else "passed"
    return last in ("timeout", "compile_error") or limits["fail_fast"] and last != "passed"


def _run_stdin(blocks: tuple, tests: tuple, limits: dict) -> list[tuple[str, str]]:
    """The results of the stdin tests, fewer where the rest need not run.

    First they are played one after the other in one process, the cost of a single one.  All the right values and a
    normal end are a pass, however they came about, and what fails in the first test does so in a new process.  Anything
    else is no result: what one test leaves behind may spoil the next, so each then gets a process of its own.  (So a
    program whose later tests need what an earlier one left, a file, say, passes when it is quick and fails when not.)
    """
    if 1 < len(tests) <= _TOGETHER and sum(len(text) for test in tests for text in test) < 1 << 18:
        # Little time: loops that never end will cost it again.
        short = limits | {"timeout": limits["timeout"] / 8, "wall": 2 * limits["timeout"]}
        end, wrong = _play_tests(blocks, tests, short)
        if end[0] == "compile_error" or end[0] == "passed" and not any(wrong):
            return [end] * len(tests)
        first = next((i for i, detail in enumerate(wrong) if detail), 0)
        if limits["fail_fast"] and wrong[0] and end[0] in ("passed", "runtime_error"):
            return [end if end[0] != "passed" else ("failed_test", wrong[0])]
        if limits["fail_fast"] and first:
            alone = _run_alone(blocks, tests[first], limits)
            if alone[0] != "passed":
                return [("passed", "")] * first + [alone]
    results = []
    for test in tests:
        results.append(_run_alone(blocks, test, limits))
        if _is_over(results, 0, limits):
            break
    return results


def _run_alone(blocks: tuple, test: tuple, limits: dict) -> tuple[str, str]:
    end, wrong = _play_tests(blocks, [test], limits)
    return ("failed_test", wrong[0]) if end[0] == "passed" and wrong[0] else end


def _play_tests(blocks: tuple, tests: list, limits: dict) -> tuple[tuple[str, str], list[str]]:
    """Several stdin tests in one process -> how it ended, and for each what was wrong with the output, or ''."""
    given, wanted = ([text.encode("utf-8", "surrogatepass") for text in texts] for texts in zip(*tests))
    inputs = given[0]
    if len(tests) > 1:  # latin-1: JSON must not join surrogates to one character
        inputs = json.dumps([text.decode("latin-1") for text in given]).encode()
    keep = 65536 + 4 * max(map(len, wanted))  # all that can come into the trainer's memory
    end, outputs = _run([json.dumps(blocks).encode(), inputs], len(tests), keep, limits)
    details = []
    for output, right in zip(outputs, wanted):
        same = output.split() == right.split()
        details.append("" if same else f"expected {right[:80]!r}, printed {output[:80]!r}")
    return end, details


def _run_asserts(blocks: tuple, asserts: tuple, limits: dict, where: str) -> list[tuple[str, str]]:
    """The results of the asserts, fewer after a timeout or where the first failure ends a program."""
    names = sorted({name for _, names, _ in asserts for name in names})
    contents = [json.dumps(content).encode() for content in (blocks, [test[:2] for test in asserts])]
    end, [report] = _run(contents, 1, 6000 * len(asserts), limits | {"names": names})
    results = [tuple(json.loads(line)) for line in report.splitlines()]
    for (outcome, detail), (_, _, place) in zip(results, asserts):
        if outcome == "unsupported":
            raise ValueError(f"{where}[{place}]['assert'] cannot be checked: {detail}")
    if results and _is_over(results, 0, limits):
        return results
    if len(results) == len(asserts) and end[0] != "passed":
        results.pop()  # it must also end well
    if end[0] == "passed":
        end = "runtime_error", "ended before this test was done"
    return results + [end] * (1 if end[0] == "timeout" else len(asserts) - len(results))


def _run(contents: list[bytes], outputs: int, keep: int, limits: dict) -> tuple[tuple[str, str], list[bytes]]:
    """One run -> how the program ended (outcome, detail), the first `keep` bytes of each output or of the report."""
    job = limits | {"output": (16 << 20) + keep, "outputs": outputs}
    reply, errors, printed = _ask(job, contents + [b""] * (1 + outputs), keep)
    detail = (errors[-400:].decode("utf-8", "replace").splitlines() or [""])[-1][:200]
    code, cpu = reply["code"], reply["cpu"]
    if reply["late"] or cpu > limits["timeout"] or code == -signal.SIGPROF:
        end = "timeout", f"over {limits['timeout']} s of CPU or {limits['wall']} s in all"
    elif "names" in limits and reply["judged"]:
        end = "failed_test", "what it returned could not be compared within the limits"
    elif code == _COMPILE:
        end = "compile_error", detail
    elif code and outputs > 1 and code != _FIRST:
        end = "unclear", detail  # in which of the tests
    elif code in (_MEMORY, -signal.SIGKILL):
        end = "memory", detail if code == _MEMORY else "killed, probably for lack of memory"
    else:
        end = ("runtime_error", detail or f"ended with status {code}") if code else ("passed", "")
    return end, printed


def _ask(job: dict, contents: list[bytes], keep: int) -> tuple[dict, bytes, list[bytes]]:
    """Lets a helper do a job, another and new one each time that it dies or hangs: its reply, the last bytes of stderr,
    and the outputs.  SandboxError when all died: no program can end its helper, so this says nothing about it."""
    for attempt in range(_ATTEMPTS):
        files = []
        try:
            # Files without a name.  Unlike pipes they never block, RLIMIT_FSIZE bounds them, and open(0) and seek work.
            # New ones each time, for a lost helper's program may have read and written.
            for content in contents:
                files.append(open(os.memfd_create("verify"), "w+b", buffering=0))
                while content:
                    content = content[files[-1].write(content):]
                files[-1].seek(0)
            helper = _take(fresh=attempt > 0)
            try:
                numbers = [file.fileno() for file in files]
                reply = helper.exchange({**job, "layers": helper.layers}, numbers, job["wall"] + _PATIENCE)
            except BaseException:
                helper.close()
                raise
            if "error" not in reply:
                _idle.append(helper)
                size = os.fstat(files[2].fileno()).st_size
                errors = os.pread(files[2].fileno(), 400, max(0, size - 400))
                return reply, errors, [os.pread(file.fileno(), keep + 1, 0) for file in files[3:]]
            helper.close()
        except (OSError, SandboxError) as error:
            lost = error
            continue
        finally:
            for file in files:
                file.close()
        raise SandboxError(reply["error"])  # of the sandbox, before the program started
    raise lost if isinstance(lost, SandboxError) else SandboxError(f"{_ATTEMPTS} helpers were lost in a row: {lost!r}")


# ---------------------------------------------------------------- helpers, seen from the trainer

_idle: list[_Helper] = []
_alive: set[_Helper] = set()
_ATTEMPTS = 10  # helpers for one run, each after the loss of the one before
_PATIENCE = 30  # seconds beyond the wall time of a run until a silent helper counts as hung
_announced = threading.Lock()  # taken once, never released


def _take(fresh: bool = False) -> _Helper:
    try:
        return _Helper() if fresh else _idle.pop()  # atomic
    except IndexError:
        return _Helper()


class _Helper:
    """A helper process and the channel to it."""

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"run_programs needs Linux, this platform is {sys.platform}; use WSL 2, or a container")
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TZ": "UTC", "LD_BIND_NOW": "1"}  # not in each fork anew
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without
            env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # -S: no site-packages, a quick start.  Not -I, which ignores PYTHONHASHSEED and so makes set order random.
        command = [sys.executable, "-s", "-S", "-B", "-c", _START, _FILE, "helper", str(theirs.fileno()), *_SANS]
        try:
            self.process = subprocess.Popen(command, env=env, cwd="/", pass_fds=[theirs.fileno()],
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                            start_new_session=True)  # Ctrl-C is for the trainer
        except OSError as error:
            self.channel.close()
            raise SandboxError(f"no helper can be started with {sys.executable}: {error}") from None
        finally:
            theirs.close()
        _alive.add(self)
        try:
            probe = {"probe": True, "memory_mb": 1024, "timeout": 9, "output": 0, "wall": 60}
            self.layers = self.exchange(probe, [], 60)["layers"]
        except (OSError, KeyError) as error:
            self.close()
            raise SandboxError(f"no helper can be started: {error} {self.said}") from None
        missing = [name for name in LAYERS if name not in self.layers]
        if missing and _announced.acquire(blocking=False):
            print(f"verify.py: the sandbox runs without {', '.join(missing)}; see `python verify.py probe`",
                  file=sys.stderr)

    def exchange(self, job: dict, files: list[int], patience: float) -> dict:
        """Sends a job and descriptors, returns the reply.  patience: seconds, for a helper that hangs.  OSError."""
        self.channel.settimeout(patience)
        socket.send_fds(self.channel, [json.dumps(job).encode()], files)
        if reply := self.channel.recv(1 << 16):
            return json.loads(reply)
        raise ConnectionError("it died")

    def close(self) -> None:
        """Ends the helper and what it runs."""
        _alive.discard(self)
        self.channel.close()
        self.process.terminate()
        try:
            self.said = self.process.communicate(timeout=5)[1][-2000:].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.said = ""


def _close_all() -> None:
    _idle.clear()
    while _alive:
        _alive.pop().close()


def _forget_all() -> None:
    """In a fork of the trainer: the helpers belong to the parent, and end when nobody holds their channel."""
    for helper in _alive:
        helper.channel.close()
    _alive.clear()
    _idle.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
_FILE = os.path.abspath(__file__)

# ---------------------------------------------------------------- inside the helper

MODULES = ("math", "cmath", "re", "random", "string", "copy", "itertools", "functools", "collections", "operator")
_COMPILE, _MEMORY, _FIRST = 201, 202, 203  # exit statuses; a program that takes one only says that it failed
_MAX_VALUE = 16 << 20         # bytes of JSON of one value
# What threading and random do after a fork would cost as much as the fork; a single thread needs none of it.
_START = """import os, sys
os.register_at_fork = lambda **_: None
__file__ = sys.argv.pop(1)
exec(compile(open(__file__, encoding="utf-8").read(), __file__, "exec"))"""


def _serve(channel: int) -> None:
    """One job at a time, until the trainer closes the channel."""
    del sys.path[0]  # the working folder
    sys.argv[:] = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # honest programs use them, -S leaves them out
    for name in (*MODULES, "bisect", "heapq", "statistics", "typing"):
        __import__(name)  # once here, not in every fork
    random.seed(0)  # verdicts shall not depend on luck
    for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)  # whoever started the trainer may have blocked or ignored them
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD])
    spaces = "namespaces" not in _SANS and _enter_namespaces()
    _libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE, from here on: nobody reads the memory of helper, judge and program
    server = os.fork()  # only a child is inside the pid namespace, as its init
    if server:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(server, signal.SIGKILL))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) & 1)
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    while (null := os.open(os.devnull, os.O_RDWR)) < 7 + _TOGETHER:
        pass  # a child needs those below for itself
    channel = socket.socket(fileno=fcntl.fcntl(channel, fcntl.F_DUPFD, null))
    for kind, value in ((resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        _limit(kind, value)
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    if hard == resource.RLIM_INFINITY or hard >= 64 << 20:  # deep recursion; the kernel looks when the stack grows
        resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, hard))
    spaces = spaces and _enter_root()
    walls = _walls(spaces)  # made once, raised in each child
    gc.freeze()  # a collection in a child would write to, and so copy, every page

    def spawn(work, *files: int) -> int:
        return os.fork() or _child(work, files, channel, job, walls)

    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 16, 32)
        if not message:
            os._exit(0)
        job = json.loads(message)
        if "probe" in job:
            pids = [spawn(None, *[null] * 6)]
        elif "names" in job:
            program, tests, errors, report = files
            ours, theirs = (end.detach() for end in socket.socketpair())
            pids = [spawn(_check_asserts, null, null, null, ours, tests, report)]
            for fd in (tests, report, ours):
                os.close(fd)  # before the program starts: it shall not find them
            pids.append(spawn(_play, null, null, errors, theirs, program, null))
            files = [program, errors, theirs]
        else:
            program, given, errors, *outputs = files
            pids = [spawn(_play, given, outputs[0], errors, null, program, null, *outputs)]
        for fd in files:
            os.close(fd)
        ended, late = _wait(set(pids), time.monotonic() + job["wall"])
        if "probe" not in job:
            (code, cpu), (judged, _) = ended[pids[-1]], ended[pids[0]]
            channel.send(json.dumps({"code": code, "cpu": cpu, "late": late, "judged": judged}).encode())
        if spaces and os.listdir("/dev/shm"):
            _libc.umount2(b"/dev/shm", 2)  # MNT_DETACH: with all that is in it
            os.close(walls["rules"]) if walls["rules"] >= 0 else None
            walls = _walls(spaces)


def _wait(pids: set[int], deadline: float) -> tuple[dict, bool]:
    """Waits for the children, kills what is left -> {pid: (exit code, CPU seconds)}, and whether it was late."""
    ended, late = {}, False
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, late
        if pid in pids:
            ended[pid] = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if pid == 0 and len(ended) < len(pids):
            late = late or not signal.sigtimedwait([signal.SIGCHLD], max(0, deadline - time.monotonic()))
        if late or len(ended) == len(pids):
            for child in pids - ended.keys():
                os.kill(child, signal.SIGKILL)
            if os.getpid() == 1:  # of our own pid namespace; anywhere else -1 means all of the user's processes
                try:
                    os.kill(-1, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def _child(work, files: tuple[int, ...], channel: socket.socket, job: dict, walls: dict) -> None:
    """Walls, then the work, in the forked child.  Descriptors: 0 stdin, 1 stdout, 2 stderr, 3 between program and
    judge, 4 source, 5 report, 6 the trainer until the walls stand, from 7 on the outputs of several tests.  Never
    returns."""
    try:
        for target, fd in enumerate((*files[:6], channel.fileno(), *files[6:])):
            os.dup2(fd, target)
        layers = _confine(job, walls, 7 + len(files[6:]))
        if work is None or layers != job["layers"]:
            answer = {"layers": layers} if work is None else {"error": f"the sandbox has changed: {layers}"}
            os.write(6, json.dumps(answer).encode())
            os._exit(0)
        os.close(6)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.setitimer(signal.ITIMER_PROF, job["timeout"])  # the CPU limit; RLIMIT_CPU, in whole seconds, backs it up
        source = os.pread(4, os.fstat(4).st_size, 0).decode("utf-8", "surrogatepass")
        os.close(4)
        work(source, job)
    except BaseException as error:
        os.write(6, json.dumps({"error": f"the sandbox failed: {error!r}"}).encode())
    finally:
        os._exit(1)


def _play(source: str, job: dict) -> None:
    """The program as __main__, for each of the inputs, and what a normal end does; under asserts the program as a
    module, then its answers to the judge on descriptor 3."""
    leave, write = os._exit, os.write  # bound now: a program may replace them
    number, inputs, outputs = 0, [None], job.get("outputs", 1)

    def fail(status: int, error: BaseException) -> None:
        write(2, f"\n{_describe(error)}".encode("utf-8", "replace"))
        leave(_FIRST if status == 1 and outputs > 1 and number == 0 else status)

    os.close(5)
    try:
        program = _choose(json.loads(source), set(job.get("names", ())))
        code = compile(program.lstrip("\ufeff"), "<program>", "exec", dont_inherit=True)
    except BaseException as error:  # SyntaxError, null bytes, surrogates, nesting too deep for the parser
        fail(_COMPILE, error)
    if outputs > 1:
        inputs = json.loads(os.pread(0, os.fstat(0).st_size, 0))
        stdin = os.dup(0)
    try:
        for number, given in enumerate(inputs):
            # Under asserts `if __name__ == "__main__"` does not run: it may read input, or exit.
            main = type(sys)("program" if "names" in job else "__main__")
            sys.modules[main.__name__] = sys.modules["__main__"] = main
            main.__file__ = "program.py"
            if given is not None:
                _rewind(given.encode("latin-1"), stdin, 7 + number)
            if "names" in job:
                exec("from typing import *", main.__dict__)  # as LeetCode gives them
            try:
                exec(code, main.__dict__)
            except SystemExit as stop:
                if "names" in job:
                    fail(1, SystemExit(f"{stop.code}; the program ended itself, so its asserts did not run"))
                if stop.code not in (None, 0):
                    raise
            if "names" in job:
                _answer(main.__dict__)
                break
            # What os._exit leaves out: join threads, exit handlers, flush.
            if number + 1 == len(inputs):
                threading._shutdown()  # a second call would not wait
            else:
                for thread in threading.enumerate():
                    if not thread.daemon and thread is not threading.main_thread():
                        thread.join()
                if threading.active_count() > 1:
                    leave(1)  # what goes on would disturb the next test
            atexit._run_exitfuncs()
            main.__dict__.clear()  # closes, and so flushes, files that the program opened on descriptor 1
            for stream in {sys.stdout, sys.__stdout__}:
                if not getattr(stream, "closed", True):
                    stream.flush()
        leave(0)
    except BaseException as error:
        fail(_MEMORY if isinstance(error, MemoryError) else 1, error)


def _choose(blocks: list[str], names: set[str]) -> str:
    """The last block that defines these names, else the last."""
    for block in reversed(blocks[:-1] and blocks):
        try:
            nodes = list(ast.walk(ast.parse(block)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        defined = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if names <= defined:
            return block
    return blocks[-1]


def _rewind(given: bytes, stdin: int, stdout: int) -> None:
    """Standard input and output as a new process would have them."""
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.ftruncate(0, 0)
    os.pwrite(0, given, 0)
    os.lseek(0, 0, os.SEEK_SET)
    plain = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, **plain)
    sys.stdout = sys.__stdout__ = open(1, "w", **plain)
    random.seed(0)


def _describe(value) -> str:
    try:
        text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)
        return " ".join(text[:200].split())
    except BaseException:  # a __str__ of the program, a number too long for decimal
        return type(value).__name__


def _answer(names: dict) -> None:
    """Does what the judge asks with the program's names and objects, a line of JSON each way, until it has ended.

    [what, target, ...]: the value of a name, an attribute, a call.  Only plain values cross; of an object its number.
    """
    kept = {}  # the objects that the judge knows, by number
    with open(3, "rb") as requests, open(3, "wb", closefd=False) as replies:
        for request in requests:
            what, target, *rest = _decode(request, kept.get)
            try:
                changed = None
                if isinstance(target, str):
                    if target not in names and not hasattr(builtins, target):
                        raise NameError(f"name {target!r} is not defined")
                    target = names[target] if target in names else getattr(builtins, target)
                if what == "call":
                    before = json.dumps(_encode(_mutable(*rest), kept))
                    value = target(*rest[0], **rest[1])
                    changed = _encode(_mutable(*rest), kept)
                    changed = None if json.dumps(changed) == before else changed
                elif what == "set":
                    value = setattr(target, *rest)
                else:
                    value = getattr(target, *rest) if rest else target
                line = json.dumps(["value", _encode(value, kept), changed], separators=(",", ":"))
                if len(line) >= _MAX_VALUE:
                    raise ValueError(f"a value of more than {_MAX_VALUE} bytes")
            except BaseException as error:
                line = json.dumps(["error", type(error).__name__, _describe(error)])
            replies.write(line.encode() + b"\n")
            replies.flush()


def _mutable(args, kwargs) -> list:
    """The arguments that a call may change, as it is seen outside."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, (list, dict, set, collections.deque))]


def _check_asserts(source: str, job: dict) -> None:
    """The judge: executes each statement and reports a line [outcome, detail] each on descriptor 5."""
    requests, replies = open(3, "wb", closefd=False), open(3, "rb")
    said = None

    def ask(what: str, target, *rest):
        nonlocal said
        request = json.dumps(_encode([what, target, *rest])).encode() + b"\n"
        try:
            requests.write(request)
            requests.flush()
            line = replies.readline(_MAX_VALUE)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            os._exit(0)  # the program is gone; how it ended is the verdict
        kind, said, more = _decode(line, lambda number: _Object(ask, number))
        if kind == "value":
            for old, new in zip(_mutable(*rest) if more else (), more or ()):
                _refill(old, new)
            return said
        raised = getattr(builtins, said, None)  # so that a test can expect a ValueError
        raised = raised if isinstance(raised, type) and issubclass(raised, Exception) else RuntimeError
        error = raised(more.partition(": ")[2])
        error.of_program = more
        raise error

    for statement, names in json.loads(source):
        try:
            scope = {"__name__": "__main__", "__builtins__": {**vars(builtins), "eval": _evaluate}}
            scope |= {name: sys.modules[name] for name in MODULES}
            scope |= {name: ask("name", name) for name in names}
            exec(compile(statement, "<assert>", "exec", dont_inherit=True), scope)
            result = "passed", ""
        except BaseException as error:
            detail = _describe(error)
            if hasattr(error, "of_program"):
                result = "memory" if isinstance(error, MemoryError) else "runtime_error", error.of_program[:400]
            elif isinstance(error, (_Unsupported, ImportError)):
                result = "unsupported", detail
            else:
                value = _describe(said)  # what the program returned last
                result = "failed_test", f"{' '.join(statement[:80].split())}: {detail}; the last value was {value:.80}"
        os.write(5, json.dumps(result).encode() + b"\n")
        if job["fail_fast"] and result[0] != "passed":
            break
    os._exit(0)


def _evaluate(text: str, *_):
    """eval for what a program returned: literals, containers and arithmetic of bounded size, else ValueError."""
    tree = ast.parse(text.strip(), mode="eval")
    nodes = list(ast.walk(tree))
    arithmetic = (ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    containers = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.expr_context)
    operations = [node for node in nodes if isinstance(node, arithmetic)]
    operands = [operand for node in operations for operand in ast.iter_child_nodes(node)]
    powers = [node for node in operations if isinstance(getattr(node, "op", None), (ast.Pow, ast.LShift))]
    bounded = all(isinstance(node, arithmetic) or type(getattr(node, "value", "")) in (int, float) for node in operands)
    bounded = bounded and len(powers) < 2 and all(abs(getattr(node.right, "value", 1001)) <= 1000 for node in powers)
    if not bounded or not all(isinstance(node, arithmetic + containers) for node in nodes):
        raise ValueError(f"{text[:80]!r} is more than a value")
    return eval(compile(tree, "<value>", "eval"), {"__builtins__": {}})


class _Unsupported(BaseException):
    """A test that wants to send a function."""


class _Object:
    """An object of the program, in the judge: called and asked by name.  Compared it would say itself what is equal."""

    def __init__(self, ask, number) -> None:
        vars(self).update(_ask=ask, _number=number)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value) -> None:
        self._ask("set", self, name, value)

    def __bool__(self) -> bool:
        return self._ask("call", "bool", (self,), {})

    def _refuse(self, *_):
        raise TypeError("objects of a program cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def _method(name: str):
    def method(self, *args):
        try:
            bound = self._ask("get", self, name)
        except AttributeError:  # which list() forgives only as a TypeError
            raise TypeError(f"an object of the program without {name}") from None
        return self._ask("call", bound, args, {})

    return method


for _name in "len iter next getitem setitem delitem str repr add sub mul truediv neg abs int float enter exit".split():
    setattr(_Object, f"__{_name}__", _method(f"__{_name}__"))


def _refill(old, new) -> None:
    """Gives a list, dict, set or deque new contents."""
    old.clear()
    (old.extend if hasattr(old, "extend") else old.update)(new)


def _encode(value, kept: dict | None = None):
    """A plain value as JSON can hold it; the other kinds as {kind: parts}; an object as its number in `kept`."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return int(value) if -2**53 < value < 2**53 else {"int": hex(value)}  # decimal is quadratic, and limited
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [_encode(item, kept) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key, kept), _encode(item, kept)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset, collections.deque):
        if isinstance(value, kind):
            return {kind.__name__: [_encode(item, kept) for item in value]}
    for kind in _EXACT:
        if isinstance(value, kind):
            return {kind.__name__: [_encode(part, kept) for part in kind.__reduce__(value)[1]]}
    if type(value) is _Object:
        return {"object": value._number}
    lazy = hasattr(type(value), "__iter__") and not isinstance(value, type)
    if lazy and type(value).__module__ != "program":
        return {"iter": [_encode(item, kept) for item in itertools.islice(value, 10_000)]}
    if kept is not None:
        kept[id(value)] = value
        return {"object": id(value)}
    # A lambda, a class, len or math.sqrt, an object of the test: nothing that a program could have returned.
    module = isinstance(getattr(value, "__self__", None), type(sys))
    of_test = module or isinstance(value, (type, type(_encode))) or type(value).__module__ == "__main__"
    error = _Unsupported if of_test else TypeError
    raise error(f"a {type(value).__name__} as an argument is not a plain value")


# Kinds that are made again from the arguments that they give to pickle.
_EXACT = (decimal.Decimal, Fraction, datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
_MAKE = {kind.__name__: kind for kind in (dict, tuple, set, frozenset, collections.deque)}
_MAKE |= {kind.__name__: lambda parts, kind=kind: kind(*parts) for kind in (complex, *_EXACT)}
_MAKE |= {"int": lambda text: int(text, 16), "bytes": bytes.fromhex, "iter": iter}


def _decode(line: bytes, find):
    """The value; `find` gives the object of a number."""
    def make(parts: dict):
        [(kind, content)] = parts.items()
        return find(content) if kind == "object" else _MAKE[kind](content)

    return json.loads(line, object_hook=make)


# ---------------------------------------------------------------- the walls

# System calls of x86_64.
_CALLS = """
read 0, write 1, readv 19, writev 20, pread64 17, pwrite64 18, lseek 8, close 3, dup 32, dup2 33, dup3 292, pipe 22,
pipe2 293, fstat 5, stat 4, lstat 6, newfstatat 262, statx 332, access 21, faccessat 269, faccessat2 439, readlink 89,
readlinkat 267, getcwd 79, chdir 80, fchdir 81, getdents64 217, open 2, openat 257, ftruncate 77, fsync 74,
fdatasync 75, flock 73, mmap 9, munmap 11, mprotect 10, mremap 25, madvise 28, brk 12, rt_sigaction 13,
rt_sigprocmask 14, rt_sigreturn 15, rt_sigtimedwait 128, sigaltstack 131, poll 7, ppoll 271, select 23, pselect6 270,
epoll_create1 291, epoll_ctl 233, epoll_wait 232, epoll_pwait 281, eventfd2 290, futex 202, set_robust_list 273,
rseq 334, gettid 186, getpid 39, getppid 110, getuid 102, geteuid 107, getgid 104, getegid 108, getpgid 121,
gettimeofday 96, time 201, clock_gettime 228, clock_getres 229, clock_nanosleep 230, nanosleep 35, getitimer 36,
setitimer 38, alarm 37, pause 34, times 100, getrusage 98, getrlimit 97, setrlimit 160, getrandom 318, uname 63,
sysinfo 99, sched_yield 24, sched_getaffinity 204, membarrier 324, sendto 44, recvfrom 45, shutdown 48, getsockopt 55,
getsockname 51, exit 60, exit_group 231, restart_syscall 219, umask 95, sendfile 40, mkdir 83, mkdirat 258, rmdir 84,
unlink 87, unlinkat 263, rename 82, renameat 264, renameat2 316, truncate 76"""
# Calls that are admitted with some values of one argument: their number, which argument, the values in hexadecimal.
_OWN = 0xEEEEEEEE  # the process's own number, to be filled in
_CHECKED_CALLS = """
56 0 3d0f00 7d0f00                      clone: threads, of glibc and of musl
62 0 eeeeeeee                           kill: itself
234 0 eeeeeeee                          tgkill: itself
302 0 0 eeeeeeee                        prlimit64: itself
53 1 1 801 80001 80801                  socketpair: streams, which go nowhere else
72 1 0 1 2 3 4 5 6 7 406                fcntl: no F_SETOWN, which can signal others
16 1 5401 5413 541b 5421 5450 5451      ioctl: isatty and the like"""
# What a program may read: libraries and time zones.
_READABLE = (os.path.dirname(os.__file__), sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64",
             "/usr/share/zoneinfo")
_DEVICES = "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"


def _enter_namespaces() -> bool:
    """User, pid and mount namespaces of our own; the pid one is for the next child."""
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(0x10000000 | 0x20000000 | 0x00020000) != 0:
        return False
    _libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: without it a plain user may not write the maps
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) != 0:
        raise OSError(f"no mount at {target}")


def _enter_root() -> bool:
    """A root folder with nothing but what a program may read, /proc of the own namespace, and an empty /dev/shm."""
    root = "/dev/shm"
    try:
        _mount("none", "/", "none", 0x44000)  # MS_REC | MS_PRIVATE: nothing goes back
        _mount("tmpfs", root, "tmpfs", 14, "size=1m")  # nosuid, nodev, noexec
        os.makedirs(root + "/dev/shm")
        for path in (*_READABLE, *_DEVICES):
            place = root + path
            if os.path.islink(path):
                os.symlink(os.readlink(path), place)
            elif os.path.exists(path) and not os.path.exists(place):
                os.makedirs(place) if os.path.isdir(path) else open(place, "w").close()
                _mount(path, place, "none", 0x5000)  # MS_BIND | MS_REC
                kept = os.statvfs(place).f_flag & 14  # the flags that a mount of others must keep
                _mount("none", place, "none", 0x1021 | kept)  # MS_BIND | MS_REMOUNT | MS_RDONLY
        os.mkdir(root + "/proc")
        _mount("proc", root + "/proc", "proc", 14)
        for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
        _mount("none", root, "none", 0x1021 | 14)
    except OSError:
        return False
    os.chroot(root)
    return True


def _walls(spaces: bool) -> dict:
    """What a helper prepares for its children: the layers that it has itself, the rules of Landlock, the filter."""
    if spaces:
        _mount("tmpfs", "/dev/shm", "tmpfs", 14, "size=16m,nr_inodes=1k")
    os.chdir("/dev/shm" if spaces else "/")
    return {"layers": ["rlimits"] + ["namespaces"] * spaces, "rules": _landlock(spaces), "filter": _seccomp()}


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _confine(job: dict, walls: dict, first_unused: int) -> list[str]:
    """Walls off this process, for good, and closes descriptors -> the names of the layers that hold."""
    _limit(resource.RLIMIT_AS, job["memory_mb"] << 20)
    _limit(resource.RLIMIT_FSIZE, job["output"])
    _limit(resource.RLIMIT_CPU, int(job["timeout"]) + 1)
    layers, prctl = list(walls["layers"]), _libc.prctl
    if walls["filter"] or walls["rules"] >= 0:
        prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: what both of them ask of a plain user
    prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the helper
    if walls["rules"] >= 0 and _libc.syscall(446, walls["rules"], 0) == 0:  # landlock_restrict_self
        layers.append("landlock")
    os.closerange(first_unused, 4096)
    if walls["filter"]:
        code, places, pointer = walls["filter"]
        own = os.getpid().to_bytes(4, sys.byteorder)
        for place in places:
            code[place:place + 4] = own
        if prctl(22, 2, pointer, 0, 0) == 0:  # PR_SET_SECCOMP
            layers.append("seccomp")
    return layers


def _landlock(scratch: bool) -> int:
    """Rules under which a process opens nothing but libraries, four devices and its scratch folder; -1 without."""
    create, add = 444, 445
    abi = _libc.syscall(create, None, 0, 1)
    if "landlock" in _SANS or abi < 1:
        return -1
    every = (1 << 13 + (abi > 1) + (abi > 2) + (abi > 4)) - 1  # 13 rights, then REFER, TRUNCATE, IOCTL_DEV
    rules = _libc.syscall(create, struct.pack("Q", every), 8, 0)
    read_file, read_folder, write_file = 4, 8, 2
    rights = dict.fromkeys(_READABLE, read_file | read_folder) | dict.fromkeys(_DEVICES, read_file | write_file)
    rights |= {"/dev/shm": every} if scratch else {}
    for path, allowed in rights.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            _libc.syscall(add, rules, 1, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    return rules


def _seccomp() -> tuple | None:
    """The filter (BPF) that admits _CALLS and, with these arguments only, _CHECKED_CALLS: its code, the places for the
    process's own number, a pointer to it (struct sock_fprog).  A child has only to fill in its number."""
    if "seccomp" in _SANS or os.uname().machine != "x86_64" or sys.maxsize < 1 << 32:
        return None
    load, equal, leave, admit, kill = 0x20, 0x15, 0x06, 0x7FFF0000, 0x80000000
    refuse = 0x50000 | 38  # ENOSYS: then the C library falls back from clone3 to clone
    code = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (leave, 0, 0, kill), (load, 0, 0, 0)]
    for line in _CHECKED_CALLS.strip().split("\n"):
        number, argument, *values = line[:40].split()
        code += [(equal, 0, len(values) + 3, int(number)), (load, 0, 0, 16 + 8 * int(argument))]
        code += _jumps(values, 16)
        code += [(leave, 0, 0, refuse), (leave, 0, 0, admit)]
    code += _jumps([call.split()[1] for call in _CALLS.split(",")], 10)
    code += [(leave, 0, 0, refuse), (leave, 0, 0, admit)]
    places = [8 * i + 4 for i, line in enumerate(code) if line[3] == _OWN]
    filled = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    return filled, places, struct.pack("HP", len(code), ctypes.addressof(filled))


def _jumps(values: list[str], base: int) -> list[tuple]:
    """Jumps behind the refusal that follows for each of the values."""
    return [(0x15, len(values) - i, 0, int(value, base)) for i, value in enumerate(values)]


# ---------------------------------------------------------------- command line

def probe() -> int:
    """Prints which layers this machine gives; 0 when all of them."""
    for name, active in (found := layers()).items():
        print(f"{'yes' if active else 'NO ':3}  {name:16}  {LAYERS[name][0]}  [{LAYERS[name][1]}]")
    return 0 if all(found.values()) else 1


def main(arguments: list[str]) -> int:
    """The command line -> exit status: 0 passed, 1 not, 2 bad input."""
    if arguments in (["-h"], ["--help"]):
        return print(__doc__) or 0
    if arguments != ["probe"] and len(arguments) != 2:
        print("usage: python verify.py PROGRAM.py TESTS.json | probe", file=sys.stderr)
        return 2
    try:
        if arguments == ["probe"]:
            return probe()
        with open(arguments[0], encoding="utf-8") as program, open(arguments[1], encoding="utf-8") as file:
            try:
                tests = json.load(file)
            except ValueError as error:
                raise ValueError(f"{arguments[1]} is no JSON: {error}") from None
            verdict = run_programs([program.read()], [tests])[0]
    except (OSError, ValueError, SandboxError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 2
    print(f"{verdict.outcome} {verdict.passed}/{verdict.total} {verdict.detail}".rstrip())
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["helper"]:
        _SANS.update(sys.argv[3:])
        _serve(int(sys.argv[2]))
    sys.exit(main(sys.argv[1:]))
