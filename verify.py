"""Did it come out right? The verifier of TraceLift: final answers of word problems, and programs against tests.

    extract_answer, math_equal     the last marked answer of a text, compared as an exact value
    code_blocks, extract_code      the fenced blocks of a completion that may be its program; the likeliest one
    check_tests                    refuses tests that cannot be judged, when a problem enters
    run_programs, exec_score       programs run in throw-away processes -> Verdict -> reward

    python verify.py        which walls of the sandbox this machine gives; standard library only, programs need Linux

In RL the verifier is the reward, and what it wrongly accepts is what the planner learns. Who trusts whom:

    trainer     starts helpers, compares stdout with outputs     <- believes exit status, CPU time, stdout, the judge
      |  descriptors of nameless files
    helper      clean, warm interpreter; forks                   <- behind the walls no program can reach it
      |   `------------.
    program <-JSON-> judge                                       <- believes of the program only data
    behind walls     behind the same walls, holds the asserts and no code of the program

The trainer, with its gigabytes, threads and CUDA, never forks. Neither a helper nor a program ever holds an expected
value: there is nothing to steal and no marker to forge. A pass needs right values and a normal end.

Threat model: programs written by a language model under reward pressure. Stopped: changing or reading the user's files,
the environment, other processes, signals, network, floods of output, memory, CPU and wall time. Where user namespaces
are allowed, 16 MB of files can be written in /dev/shm. A kernel without Landlock (gVisor, older than 5.13) leaves the
user's files readable and refuses all writing; a line on stderr says so. NOT stopped: bugs of the kernel, timing
channels, reading Python's own files. A program sees the inputs of all its stdin tests, and a function that a test takes
from the program (HumanEval/32 calls its `poly`) is the program's.

Refused, though some honest program needs it: packages beyond the standard library, processes, sockets, and in asserts
operators between objects of the program (==, +, in), the end of a `with`, its exception classes, and functions or
iterators of the test as arguments (builtins and functions of MODULES may cross).
"""
from __future__ import annotations

import os
import sys

if sys.argv[1:2] == ["helper"]:
    os.register_at_fork = lambda **_: None       # what threading and random do after a fork costs as much as the fork

import ast
import atexit
import builtins
import collections
import contextlib
import ctypes
import datetime
import decimal
import gc
import json
import math
import operator
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import textwrap
import threading
import time
import types
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

libc = ctypes.CDLL(None, use_errno=True)

# ---------------------------------------------------------------- answers

MAX_ANSWER = 4000  # characters of one answer; a longer one is no answer
MAX_NUMBER = 800   # characters of one number, whose exponent has three digits: bounds the big-integer arithmetic

# What announces an answer. #### also begins headings of Markdown, which have text below them.
_MARKER = re.compile(r"#+ *(?:final +)?answer\W*?\n\s*|####[#\s]*|答案(?:是|为|為)?[\s:：]*"
                     r"|\banswer\**\s*(?:is\b|would be\b|should be\b|:|=)[\s:*]*", re.IGNORECASE)
_BALANCED = r"(?:[^{}\\]|\\.)*"
for _ in range(4):                                                # braces in braces, so deep
    _BALANCED = r"(?:[^{}\\]|\\.|\{" + _BALANCED + r"\})*"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(" + _BALANCED + r")\}|<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_OPENED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Behind a box: the answer said again, with at most one plain word, and not a sentence about it.
_AGAIN = re.compile(r"[\W_]*(?:(?:so|thus|hence|therefore|and|the|my|our|final|correct|answer|is)\b[\W_]*)*|.*答案.*", re.IGNORECASE)
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_END = re.compile(r"(?<!Rs)\.(?:\s|$)|(?<=[A-Za-z])[!?](?:\s|$)|[\s(,]+(?:because|since)\b|,\s+(?:in|so|as|for)\b(?!.*=)")
_FORMULA = re.compile(r"([^0-9$]*)\$([^$]+)\$([^0-9$]*)")          # in a sentence
_VALUE = re.compile(r"[0-9½⅓¼√π∞=]|\\(?!text|math|mbox)[A-Za-z]")
_LABEL = re.compile(r"\b(?:step|part|case|section|example|question|problem|method|equation|line)\s*#?\(?[0-9]+\)?"
                    r"|^\s*[0-9]+[.)]\s+(?=[A-Za-z])", re.IGNORECASE)
_OPTION = re.compile(r"(?i)(?:the\s+)?(?:(?:correct\s+)?(?:option|choice|letter|answer)\s*)?[(]?([A-Z])[).]?")
_BULLET = re.compile(r"^\s*[-\u2013\u2014\u2212\u2022*]\s+")        # at the start of a line
_DASH = re.compile(r"([^\W\d]{2}[:*]*\s|[^\W\d]:)\s*[-\u2013\u2014\u2212]\s+")  # after a word: no minus sign
# Between two numbers: they are two guesses, or a sum.
_HEDGE = re.compile(r"(?i)[\s,;&/-]*(?:(?:and|to)\b[\s$]*(?:[a-z] *= *)?)?|.*\b(?:or|maybe|perhaps|possibly)\b.*")

# Up to two words before a number, and in its clause behind it.
_BEFORE = re.compile(r"(?:[^\s=]+\s+){0,2}[^\s=]*$")
_IN_CLAUSE = r"(?![.;!?)](?:\s|$)|,\s|[。，；！？]|\s-\s[A-Za-z]{3})"
_BEHIND = re.compile(rf"(?:{_IN_CLAUSE}\S)*(?:{_IN_CLAUSE}\s+(?:{_IN_CLAUSE}\S)+){{0,2}}")

# [0-9] and not \d, which also matches the digits of every other script.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
_SIGNED = r"\([-+]?[0-9]+(?:\.[0-9]+)?\)"
_NUMBER = re.compile(rf"(?<![\^_0-9.])(?<!\^-)(?:(?<![\w)\]}}])([-+])(\s*))?"
                     rf"(?:({_WHOLE})\s+(?={_WHOLE}\s*/))?({_DECIMAL}|{_SIGNED}(?=\s*/))"
                     rf"(?:\s*/\s*([-+]?{_DECIMAL}|{_SIGNED}))?(?:\s?%)?")

# Words beside a number are its unit, or the sentence around it, if they are ordinary words of three letters or more, or
# among the short ones below. Those of _NOT_UNITS, Greek letters and products of letters make another number of it.
_NOT_UNITS = set("""
    hundred thousand million billion trillion quadrillion lakh crore bn mn tn bil mil mio myriad dozen gross half grand
    halve third quarter fourth fifth sixth seventh eighth ninth tenth eleventh twelfth twentieth thirteenth score
    fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth thirtieth fortieth fiftieth sixtieth hundredth
    thousandth millionth billionth squared cubed factorial power root reciprocal inverse divided multiplied plus
    minus or not pi sqrt sin cos tan log ln exp mod choose infinity infinite negative below zero basis maybe perhaps
    possibly probably but otherwise except either neither nor without approximately approx roughly wrong incorrect
    undefined double triple twice thrice least most isn doesn wasn cannot never alpha beta gamma delta epsilon zeta
    eta theta iota kappa lambda mu nu xi omicron rho sigma tau upsilon phi chi psi omega
    repeating repeated recurring recurrent periodic far close near nowhere unlike instead beyond exceed exceeding short
    opposite base modulo remainder fold couple few several ish false impossible unknown rather""".split())
_HEDGES = set("about around nearly almost over under than between within up off if unless".split())   # before a number
_CURRENCIES = set("usd us eur gbp inr cny jpy rs r".split())
_AFTER = set("m s g h L l".split())                             # alone behind a number; other letters may be variables
_JOINED = set("mm cm km mg kg ml mL in ft lb lbs oz hr hrs min mins sec mph kmh am pm".split())           # 5cm
_SHORT = _JOINED | set("""kph rpm pcs yd yds mi sq cu gb mb kb tb ms ns kw kj kn mw hz rs usd eur gbp inr cny jpy kgs kms
    mls cds dvds tvs pt pts qt gal yr yrs tbsp tsp bc ad ce a is he we it of in on at by as an so if us to no be do go per
    and she her his the""".split())
_PRODUCT = re.compile(r".{1,2}|[a-d]{3,4}|[h-n]{3,4}|[p-t]{3,4}|[u-z]{3,4}|[^aeiouy]{3,4}")  # abc, xyz are no words
_NO_NUMBER = re.compile("[\u0370-\u03ff]|[十百千万萬亿億兆半打负負천만억](?![克米])")     # Greek letters, other digits
_WORD = re.compile(r"(?:(?<=[0-9])([^\W\d_]+)|(?<![\\\w^/(*√])[^\W\d_]+(?:[-'’/][^\W\d_]+)*)(?:\^-?[1-3])?(?![\w^(\[{'\"]|\.\w)[!?:]?")
# Who says one side of a line does not say another of it: 5 am is not 5 pm, nor are 5 km 5 m.
_RIVALS = [[set(side.split()) for side in line.split("|")] for line in """am | pm; bc bce | ad ce;
    loss lost lose deficit owe debt | profit gain gained earned surplus; north | south | east | west; left | right;
    fewer less decrease decreased lower | more extra increase increased higher; up | down; above | below; odd | even;
    before | after; early | late; ahead | behind; older | younger; faster | slower; taller longer | shorter;
    heavier | lighter; clockwise | counterclockwise anticlockwise; square sq | cubic cu; degree | radian rad;
    celsius | fahrenheit | kelvin; january jan | february feb | march | april apr | may | june jun | july jul |
    august aug | september sep sept | october oct | november nov | december dec;
    mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre kmh kph | inch inche |
    ft foot feet | yd yard | mi mile mph; mg milligram | g gram | kg kilogram | lb pound | oz ounce | ton tonne;
    ml milliliter millilitre | l liter litre | cup | pint | quart | gallon gal;
    ms millisecond | s sec second | min minute | h hr hour | day | week | month | yr year;
    cent penny pence | dollar usd | euro eur | pound gbp | rupee inr | yen jpy | yuan cny 元""".split(";")]


_SYMBOL = "[A-Za-zπ∞θαβγφλμσω]"
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|([0-9]|SYMBOL))"                # of a TeX command


def _rules(table):
    """A line is a pattern, an arrow and what replaces it (␣ is a blank)."""
    table = table.replace("ARGUMENT", _ARGUMENT).replace("SYMBOL", _SYMBOL).replace("DECIMAL", _DECIMAL)
    pairs = [line.split(" =>") for line in table.strip().split("\n")]
    return [(re.compile(pattern.strip(), re.DOTALL), new.strip().replace("␣", " ")) for pattern, new in pairs]


def _rewrite(text, rules):
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


_TOKEN = r"<\|[^<>|\n]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?s>|<(?:eos|pad|end_of_turn)>"   # controls a chat
# What is no part of an answer: a template of a box, control tokens, GSM8K's calculator; \boxed5 gets its braces.
_LAYOUT = _rules(rf"""
    \\(?:boxed|fbox)\s*\{{(?:[.…\s]*|(?i:your|the|final|\s)*(?i:answer)\s*)\}} =>
    {_TOKEN} => ␣
    <<[^<>]*>> =>
    (\\boxed|\\fbox)(?:\s*([0-9][0-9.,/]*)|\s+([A-Za-z])(?![A-Za-z])) => \1{{\2\3}}""")
_UNWRAP = _rules(r"\\text\{([^{}]*)\} => \1")
_LISTS = _rules(r"""
    degrees =>
    ,? and (?!\S* (?!\S*\d)) => ,""")
# A side of a calculation: commas of thousands and after words, x between numbers; what a result is for.
_SIDES = _rules(r"""
    (?<=[0-9]),(?=[0-9]{3})|(?<=[A-Za-z])[,:](?=\s)|\bx(?= ?[0-9]) =>""")
_RESULT = re.compile(r"(?<=[a-z])\s(?:out of|for|in|after|before|that|on|with|during|by|from|of)\s.*|(?<=[0-9])\sfor\s.*")
_JOINTS = _rules(r"""
    \s*(\W|[π∞])\s* => \1
    (?<=[0-9]) (?=[a-z](?![a-z])) =>""")
# A formula or a block on lines of its own.
_DISPLAY = re.compile(r"(?<!\\)\\\[((?:[^\\]|\\[^\[\]]){0,1000}?)\\\]|\$\$([^$]{1,1000})\$\$"
                      r"|\$([^$]{0,200}\\begin[^$]{1,800})\$|^```\w*\n([^`]{1,200})\n```", re.MULTILINE)
# Signs and abbreviations as words. A dollar without a partner is money; two of them enclose a formula.
_SPOKEN = _rules(r"""
    \b([ap])\.\s?m\b => \1m
    (?<=[0-9])(?=(?:mm|cm|km|mg|kg|ml|am|pm|hr|min|sec|mph)\b) => ␣
    \\\$|^\$(?=[^$]*$) => ␣dollar␣
    °\s?C\b => ␣celsius␣
    °\s?F\b => ␣fahrenheit␣
    € => ␣euro␣
    £ => ␣pound␣
    ₹ => ␣rupee␣
    [¥￥] => ␣yen␣""")
# One spelling for what TeX and Unicode spell in several ways, in this order; then from the innermost braces outwards.
_CHARACTERS = str.maketrans({
    **dict(zip("½⅓⅔¼¾⅕⅛", " 1/2 | 1/3 | 2/3 | 1/4 | 3/4 | 1/5 | 1/8 ".split("|"))),
    **dict(zip("−–‒⁄∕×·⋅⩽⩾’⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "---//***≤≥'0123456789-0123456789")),
    **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}})  # full-width characters
_TYPOGRAPHY = _rules(r"""
    ([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+) => ^{\1}
    ([₀₁₂₃₄₅₆₇₈₉]+) => _{\1}
    \b([ap])\.\s?m\b => \1m
    (?:^|\s)~\s?(?=\$?[0-9]) => ␣≈
    \.{2,}|\\[lc]?dots(?![a-z]) => …
    \{,\}(?=[0-9]{3}) => ,
    (?<=[0-9A-Za-z)])\*\*(?=[0-9A-Za-z(]) => ^
    (?<=[0-9])\s*/\s*(?=[a-z]{3}) => ␣per␣
    \\! =>
    \\% => %
    (?<=[0-9])(?:\\,|[\u00a0\u202f\u2006\u2009])(?=[0-9]{3}(?![0-9])) => ,
    \\begin\{([pb]?matrix)\}(.*?)(?:\\\\\s*)?\\end\{\1\} => ⎡\2⎤
    \\\\(?:\[\w*\])? => ⏎
    \\(?:\{|lbrace(?![a-z])) => ⦃
    \\(?:\}|rbrace(?![a-z])) => ⦄
    \\[()\[\]]|\*\*|(?<=-)\s*\\?[$€£¥₹]\s* =>
    \\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![A-Za-z])|\\?[$€£¥₹]|\\[,;:\s]|[~\s] => ␣
    [ ]+ => ␣
    \\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|[mh]box|operatorname|emph|underline)\s*\{((?:[^{}]|\{[^{}]*\})*)\} => ␣\1␣
    \\[dtc]frac(?![a-z]) => \\frac
    (?:\^\s*)?(?:\{\s*)?(?:\\(?:circ|degree)(?![a-z])|°)(?:\s*\})?(?:\s*[CF]\b)? => ␣degrees␣
    \bpi\b => π
    \binfinity\b => ∞
    \+\s*∞ => ∞
    \bsqrt\b => √
    <= => ≤
    >= => ≥
    != => ≠
    ⦃\s*⦄ => ∅
    == => =
    \s+([\^_]) => \1
    (\\[A-Za-z]+|[}\]√])\s+(?=\{) => \1""")
_COMMANDS = dict(zip("""pi infty sqrt le leq leqslant ge geq geqslant ne neq lt gt emptyset varnothing angle times cdot
    cup cap in pm theta alpha beta""".split(), "π∞√≤≤≤≥≥≥≠≠<>∅∅∠**∪∩∈±θαβ"))
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
    ^([-+]?)\(([^()=,]+)\)\s*/\s*\(([^()=,]+)\)\s*%$ => \1(\2)/(\3)
    (?<![\w√\])\\^_])\(((?:[^()+\-/,=±]|√\([^()]*\))+)\)/ => \1/
    /\(([0-9]+(?:\.[0-9]+)?|SYMBOL|√\([^()]*\))\) => /\1␣
    ^-\s*\(\s*([0-9.]+\s*/\s*[0-9.]+)\s*\)$ => -\1
    ([\^_])\((-?(?:[0-9]+(?:\.[0-9]+)?|SYMBOL))\) => \1\2␣
    \\(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)\s*(?:\((SYMBOL|[0-9.]+)\)|(?<=[a-z])\s+(SYMBOL|[0-9.]+)) => \1(\2\3)
    (?<![0-9.,])(DECIMAL)\s*[*x]\s*10\s*\^\s*\(?([-+]?[0-9]+)\)? => \1e\2
    (?<=[\w)])\s*\*\s*(?=[√π(a-z\\]) =>""")


def extract_answer(text: str) -> str | None:
    r"""The final answer of a solution, as written; None when there is none.

    The last marker with a value wins: \boxed{x}, <answer>x</answer>, '#### x', 'answer is x', 'Answer: x' (to the end of
    the line or sentence). Words after one ("the answer is reasonable") count only when no other has a value; after a box
    only a bare value counts. Without a marker it is the last number of the last line, with the words behind it. Guesses
    side by side ("3 or 4", two boxes in one sentence) come back as they stand, and equal no number. Text in <think>, or
    in a box that is not closed, is not an answer. Time is linear in the text.
    """
    text = _said(text)
    marked = _marked(text)
    if marked is None:
        return _last_number(_clean(_without_dashes(text.rstrip()[-MAX_ANSWER:].rpartition("\n")[2])))
    return marked if 0 < len(marked) <= MAX_ANSWER else None


def math_equal(prediction: str | None, reference: str) -> bool:
    r"""Whether two final answers (or texts with a marked one) are the same value.

    Numbers are exact rationals, without tolerance, also as fraction, mixed number or 1.5e3; a unit or currency is
    ignored unless the reference's contradicts it (_RIVALS), and percent is a unit (50% is 50, not 0.5). Of a sentence
    with one number that number counts, of a calculation the last side: x = 5 is 5, but not y = 5; x = 5 or x = 8 is
    neither. (1, 2), [1, 2), {1, 2} and 1, 2 are four different things; only the braces ignore order. All else is text in
    one spelling of TeX, compared without case: powers and roots are not evaluated. "24 or 25", "24, yes" and "far from
    24" are not 24, nor are number words. None, the empty text, and what is longer than MAX_ANSWER equal nothing.
    """
    answers, words = [], []
    for text in (_said(prediction or ""), _said(reference)):
        marked = _marked(text)
        text = text.strip() if marked is None else marked
        if not 0 < len(text) <= MAX_ANSWER:
            return False
        answers.append(_value(_clean(text)))
        words.append(_words(_rewrite(text, _SPOKEN)))
    for sides in _RIVALS:
        said, wanted = ({i for i, side in enumerate(sides) if side & those} for those in words)
        if said and wanted and not said & wanted:
            return False
    said, wanted = answers
    return said.name in ("", wanted.name or said.name) and wanted.lead <= said.lead and said.value == wanted.value


def _said(text):
    """What follows the last closed thought, without layout; a displayed formula becomes one line."""
    text = _rewrite(re.split(r"</think\w*>", text)[-1], _LAYOUT)
    return _DISPLAY.sub(lambda match: f"${' '.join(''.join(filter(None, match.groups())).split())}$", text)


def _marked(text):
    """The marked answer of a text; None without one, '' where the text ends in a thought or a box that nothing closes."""
    text, thinks, _ = text.partition("<think")
    boxes = list(_BOX.finditer(text))[-2:]
    end = boxes[-1].end() if boxes else 0
    opened = _OPENED.search(text, end)
    text = text[:opened.start()] if opened else text
    words = "" if thinks or opened else None
    for match in list(_MARKER.finditer(text, end))[:-20:-1]:      # no more: each costs a line
        line, _, below = text[match.end():match.end() + MAX_ANSWER + 1].partition("\n")
        lead = text[end:match.start()].rpartition("\n")[2]
        if boxes and not (_AGAIN.fullmatch(lead[-100:] + match[0]) and len(_PLAIN_WORD.findall(line)) < 2):
            continue
        line = _BULLET.sub("", line) if "\n" in match[0] else line
        line = _LABEL.sub("", _END.split(_without_dashes(line), maxsplit=1)[0]).strip(" \t\r*`_")
        formula = _FORMULA.fullmatch(line)
        if formula and not (_NOT_UNITS | _HEDGES) & _words(formula[1]):
            return formula[2] + formula[3]
        if _VALUE.search(line) or _OPTION.fullmatch(line.strip(" $\\()*.")):
            return line
        if not (match[0].startswith("#") and below.strip()):      # else a heading
            words = words or line or None
    if not boxes:
        return words
    contents = ["".join(filter(None, box.groups())).strip() for box in boxes]
    between = text[boxes[0].end():boxes[-1].start()] + "x"
    # Boxes in one sentence may be two answers; tags are not.
    guesses = boxes[-1][1] and len(set(contents)) > 1 and not re.search(r"\n|[.!?]\s", between.lstrip())
    if guesses and not _MARKER.search(between):
        return " or ".join(contents)
    # \boxed{Answer: 24}, <answer>\boxed{24}</answer>
    return _marked(_rewrite(contents[-1][:MAX_ANSWER + 1], _UNWRAP)) or contents[-1]


def _without_dashes(line):
    """A line of prose without the dashes after words, which are not minus signs; in TeX all are."""
    return line if re.search(r"[$\\]", line) else _DASH.sub(r"\1 ", line)


def _last_number(line):
    """The last number of a line, with two words on either side where they make something else of it (4 dozen)."""
    line = _BULLET.sub("", line)
    numbers = list(_NUMBER.finditer(line))[-2:]
    if not numbers:
        return None
    start, end = numbers[-1].span()
    if len(numbers) == 2 and _HEDGE.fullmatch(line, numbers[0].end(), start):
        return line[numbers[0].start():end]                       # two guesses
    end = _BEHIND.match(line, end).end()                          # its unit, perhaps
    phrase = line[_BEFORE.search(line[:start]).start():end].strip()
    return phrase if _number(phrase) is None else line[start:end].strip()


def _clean(text):
    r"""One spelling: no typography, currency or layout; \frac{a}{b} is a/b, \sqrt3 is √(3), x^{2} is x^2, \leq is ≤."""
    text = re.sub(r"\\([A-Za-z]+)", lambda command: _COMMANDS.get(command[1], command[0]), text)
    text = _rewrite(text, _TYPOGRAPHY).translate(_CHARACTERS)
    for _ in range(8):                                            # from the innermost braces outwards
        text = _rewrite(text, _BRACES)
    return _rewrite(text, _BRACKETS).lstrip(" *`'\"").rstrip(" *`'\".,;:")


def _words(text):
    """The words of a text without case, and each without the s of a plural."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return {*words, *(word.rstrip("s") for word in words)}


class _Answer(NamedTuple):
    """value: a number as 3/4, or text in which every number is; name: x of x = 5; lead: the words before a number, which
    must be the same (June 5 is not July 5)."""
    value: str
    name: str = ""
    lead: frozenset = frozenset()


def _value(text):
    """Of a number its value; of x = 2 * 3 = 6 the last side, if the first is a name, a sum of names or a calculation,
    and those between are calculations; else one spelling of the text."""
    if re.fullmatch(r"\([^(),]*\)", text):
        text = text[1:-1]
    found = _number(text)
    first, *others = re.split("[=∈]", text)
    if found or not others or re.search("[<>≤≥≠≈]", text):
        return found or _Answer(_as_text(text))
    name = _as_text(first)
    named = re.fullmatch(r"∠?[^\W\d_][\w' ]*(?:\([^()=]*\))?(?:\+[^\W\d_]\w*)*|\([^\W\d](?:,[^\W\d])*\)|", name)
    named = named and not _NOT_UNITS & _words(first)
    if (named or _is_calculation(first)) and all(map(_is_calculation, others[:-1])):
        last = others[-1].strip() if named else _RESULT.sub("", others[-1].strip())
        return _value(last)._replace(name=name if named else "")
    return _Answer(_as_text(text))


def _is_calculation(text):
    """Whether a side of an equation is a number or arithmetic, perhaps with units or in a sentence."""
    rest = _WORD.sub(_drop, _rewrite(text, _SIDES))
    return not _NOT_UNITS & _words(text) and re.fullmatch(r"[0-9\s.+*/()%÷^√π-]*", rest) is not None


def _as_text(text):
    option = _OPTION.fullmatch(text)
    text = " ".join((option[1] if option else text).casefold().split())
    text = _rewrite(text, _LISTS)
    if text[:1] in tuple("([⦃"):                                  # here a comma has no thousands behind it
        text = text.replace(",", ", ")
    text = _NUMBER.sub(_spell, text)
    text = re.sub(r"⦃[^⦃⦄]*⦄", _sort, _rewrite(text, _JOINTS))
    # A unit after an expression is ignored, as after a number.
    match = re.fullmatch(r"([-(√0-9].*?[0-9)π]) ?((?!π)[^\W\d_]{2}.*)", text)
    is_unit = match and not _NOT_UNITS & _words(match[2]) and not _WORD.sub(_drop, f" {match[2]}").strip()
    return match[1] if is_unit and not _NUMBER.fullmatch(match[1]) else text


def _number(text):
    """The one number of a text that otherwise holds but words: its unit after it, perhaps a sentence around it."""
    match = _NUMBER.fullmatch(_WORD.sub(_drop, text).strip(" ,.:;\""))
    found = match and _NUMBER.search(text)
    if not found or found[0].strip() != match[0] or _NOT_UNITS & _words(text) or _NO_NUMBER.search(text):
        return None
    lead, value = _words(text[:found.start()]), _rational(match)
    # "5, yes" is two answers; "- 24 apples" may be a bullet
    if value is None or _HEDGES & lead or match[2] and _WORD.search(text) or re.match(r".*?[,;]\s*\w", text[found.end():]):
        return None
    return _Answer(str(value), lead=frozenset(lead - _CURRENCIES))


def _spell(match):
    value = _rational(match)
    return match[0] if value is None else f"{match[1] or ''}{abs(value)}"


def _sort(match):
    return f"⦃{sorted(set(re.findall(r'[(][^()]*[)]|[^,⦃⦄]+', match[0])))}⦄"


def _rational(match):
    if len(match[0]) > MAX_NUMBER:
        return None
    value, divisor, whole = (Fraction((match[i] or default).replace(",", "").strip("()"))
                             for i, default in ((4, ""), (5, "1"), (3, "0")))
    if divisor == 0 or whole and value >= divisor:                # 1 3/2 is no mixed number
        return None
    return (whole + value / divisor) * (-1 if match[1] == "-" else 1)


def _drop(match):
    """A blank for a word that is but a word."""
    for word in re.findall(r"[^\W\d_]+", match[0]):
        name = word.casefold()
        joined = match[1]                                         # to a number: 5cm
        known = word in _JOINED if joined else word in _AFTER or name in _SHORT
        if not known and name < "\u2e80" and (joined or _PRODUCT.fullmatch(name)):
            return match[0]
    return " "


# ---------------------------------------------------------------- the program of a completion, and its score

OUTCOMES = ("compile_error", "timeout", "memory", "runtime_error", "failed_test", "passed", "no_tests")  # worst first
# A closing fence is indented at most three blanks more than the opening one, or follows the last character.
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})(?![`~])([^`\n]*)(?:\n|(?=`))(.*?)"
                    r"(?:(?<=\n)\1? {0,3}\2[`~]*[ \t]*$|(?<=[^\s`~])\2[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"\W*(?:[\w/.]*\.py|i?python[0-9.]*|py[0-9.]*)(?![-\w])", re.IGNORECASE)
# Code on the fence's own line: ```python print(1)
_BEGUN = re.compile(r"^([ \t]*`{3}(?:i?python[0-9.]*|py)?)[ \t]*"
                    r"(?=(?:import|from|def|class|for|while|if|with)\b.* |[A-Za-z_][\w.]*(?:\(| = ))", re.MULTILINE)
_OUTPUT = re.compile(r"\s*(?:>>>|\$ |Traceback|(?:pip3?|python3?|bash|cd) |[\[({0-9-]|['\"](?!['\"]{2}))")
_DEFINES = re.compile(r"^(?:async +def +|def +|class +|(?=\w+ *= *lambda\b))(\w+)", re.MULTILINE)
_READS = re.compile(r"\binput\(|\bstdin\b|\bopen\(0|\bos\.read\(")


def code_blocks(text: str) -> list[str]:
    """The fenced blocks (``` or ~~~; unclosed: to the end) that may be the program, in their order, never none: those
    tagged as Python; else those without a tag that look like code; else all; else the text. CRLF becomes LF."""
    text = re.sub(rf"(?:\s*(?:{_TOKEN})){{1,9}}\s*\Z", "", text.replace("\r\n", "\n"))
    if text.lstrip().startswith("<think"):
        text = re.split(r"</think\w*>", text)[-1] if "</think" in text else ""
    found = {2: [], 1: [], 0: []}                                 # the likeliest first
    for _, _, info, body in _FENCE.findall(_BEGUN.sub(r"\1\n", text)):
        tagged = _PYTHON.match(info)
        plain = not info.strip() and re.search(r"[=(]|\bimport\b", body) and not _OUTPUT.match(body)
        if body.strip():
            found[2 if tagged else bool(plain)].append(textwrap.dedent(body).removesuffix("\n"))
    return found[2] or found[1] or found[0] or [text.split("\n```")[0]]


def extract_code(text: str) -> str:
    """The likeliest program of a completion. Where tests ask for a name, run_programs chooses better among all of its
    code_blocks."""
    return _choose(code_blocks(text), [])


def _choose(blocks, tests):
    """The last of the blocks that define most of what the asserts mention; of equal ones one that reads input, else one
    that defines anything: others show how to call it, or its cost."""
    asserts = "\n".join(test.get("assert", "") for test in tests)
    asked = set(re.findall(r"\w+", asserts)) - set(_DEFINES.findall(asserts))

    def merit(block):
        defined = set(_DEFINES.findall(block))
        return len(defined & asked), bool(_READS.search(block)), bool(defined)
    return max(reversed(blocks), key=merit)


_SCORES = {"passed": (1.0, 0.2), "failed_test": (-0.3, 0.2), "compile_error": (-1.0, 0.0), "no_tests": (0.0, 0.0)}


@dataclass(frozen=True)
class Verdict:
    """What became of one program. outcome: the worst over its tests, in the order of OUTCOMES; passed: how many of the
    total counting tests; detail: the first test with that outcome and what happened, in ASCII, for people to read."""
    outcome: str
    passed: int
    total: int
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "passed"


def exec_score(verdict: Verdict, style: str) -> float:
    """The reward of a program. "binary": 1 or 0. "pass_rate": passed / total. "coderl": 1, -0.3 (a test failed), -0.6
    (it crashed or hit a limit), -1 (does not compile). "hybrid": 0.8 * pass rate, + 0.2 when it ran to the end, + 0.05
    when it did not. No tests: 0 in every style, equal over a whole group, hence without effect."""
    rate = verdict.passed / max(1, verdict.total)
    coderl, bonus = _SCORES.get(verdict.outcome, (-0.6, 0.05))
    scores = {"binary": float(verdict.ok), "pass_rate": rate, "coderl": coderl, "hybrid": 0.8 * rate + bonus}
    if style not in scores:
        raise ValueError(f"style must be one of {', '.join(scores)}, not {style!r}")
    return scores[style]


# ---------------------------------------------------------------- programs against tests

class SandboxError(RuntimeError):
    """The machinery failed, not the program: no verdict exists."""


# Of these a test may pass functions and classes to the program, beside the builtins.
MODULES = ("math", "cmath", "re", "random", "string", "copy", "itertools", "functools", "collections", "operator",
           "heapq", "bisect", "datetime", "decimal", "fractions")
_RUNS_CODE = set("exec compile pickle marshal shelve importlib builtins subprocess ctypes runpy code".split())


def check_tests(tests: list[dict], where: str = "tests") -> None:
    """Refuses tests that cannot be judged, when a problem enters. ValueError names the test: a wrong type or key, no valid
    Python, no assert, a module beyond the standard library, a lambda for the program, what would run returned code."""
    if not isinstance(tests, (list, tuple)):
        raise ValueError(f"{where} must be a list of tests, not {type(tests).__name__}")
    for j, test in enumerate(tests):
        texts = {key for key in ("assert", "input", "output") if isinstance(test, dict) and isinstance(test.get(key), str)}
        if texts not in ({"assert"}, {"input", "output"}):
            raise ValueError(f"{where}[{j}] must have a text under 'assert', or under 'input' and 'output': {test!r:.80}")
        try:
            _check_statement(ast.parse(test.get("assert", "").strip()))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{where}[{j}]['assert'] cannot be judged: {error}") from None


def _check_statement(tree):
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in imports}
    if not modules <= sys.stdlib_module_names:
        raise ValueError(f"no {', '.join(modules)}: the standard library is all that programs and tests have")
    dangerous = _RUNS_CODE & modules.union(getattr(node, "id", "") for node in nodes)
    if dangerous:
        raise ValueError(f"with {min(dangerous)} it might run what a program returned")
    own = {*dir(builtins), *(getattr(node, "name", "") for node in nodes)}
    for call in nodes:
        takes_lambda = isinstance(call, ast.Call) and any(isinstance(argument, ast.Lambda) for argument in call.args)
        if takes_lambda and getattr(call.func, "id", "print") not in own:
            raise ValueError(f"it hands a lambda to {call.func.id}, which cannot cross to the program")
    if tree.body and not any(isinstance(node, ast.Assert) for node in nodes):
        raise ValueError("there is no assert in it")


def run_programs(programs: list[str | list[str]], tests: list[list[dict]], *, timeout: float = 2.0,
                 memory_mb: int = 1024, workers: int | None = None, fail_fast: bool = False) -> list[Verdict]:
    """Runs programs[i] against tests[i]; one Verdict per program. Equal jobs run once. Safe to call from threads.

    programs   the text of each, or all its code_blocks; the standard library is all that they can import
    tests      {"input", "output"}: a run with that stdin, which must end normally and print the same tokens between
               blanks (decimals with a point: within a relative 1e-6); {"assert"}: statements that see the program's
               names and MODULES; those of one program share one run, in which it is not __main__. A blank output, or
               an assert that asks the program for nothing, does not count.
    timeout    CPU seconds per run. Wall time: 0.5 s + timeout + 5 * the CPU time used so far, so that a sleeper ends
               soon and a busy machine decides nothing. No test is run after a timeout.
    memory_mb  address space in MiB, about 40 of which are the interpreter's
    workers    helpers at a time; default: one per core, of which processes of torchrun have an equal share
    fail_fast  the first failed test ends a program: right where only Verdict.ok counts, and faster
    ValueError names a bad test (check_tests); SandboxError or OSError where no helper can be started.
    """
    from concurrent.futures import ThreadPoolExecutor              # here: helpers are lighter without
    jobs = []
    for i, (blocks, own) in enumerate(zip(programs, tests, strict=True)):
        check_tests(own, f"tests[{i}]")
        jobs.append((blocks if isinstance(blocks, str) else _choose(blocks, own), own))
    limits = {"timeout": timeout, "memory_mb": memory_mb, "fail_fast": fail_fast}
    distinct = {repr(job): job for job in jobs}
    with ThreadPoolExecutor(workers or _cores()) as pool:
        verdicts = dict(zip(distinct, pool.map(lambda job: _judge(*job, limits), distinct.values())))
    return [verdicts[repr(job)] for job in jobs]


def _cores():
    """Cores of this process: a container may have a quota, and torchrun says how many processes share the machine."""
    cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):                # no such file; without a quota it is "max"
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = map(int, file.read().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _judge(program, tests, limits):
    stdin = [test for test in tests if test.get("output", "").strip()]
    asserts = [test["assert"].strip() for test in tests if test.get("assert", "").strip()]
    results = _run_stdin(program, stdin, limits)
    if asserts and not (results and _is_over(results[-1], limits)):
        results += _run_asserts(program, asserts, limits)
    outcomes, total = [outcome for outcome, _ in results], len(stdin) + len(asserts)
    by_outcome = sorted(enumerate(results, 1), key=lambda result: OUTCOMES.index(result[1][0]))
    number, (worst, detail) = by_outcome[0] if results else (0, ("no_tests", ""))
    detail = detail and f"test {number} of {total}: {detail}"
    detail = detail.encode("ascii", "backslashreplace")[:500].decode()
    return Verdict(worst, outcomes.count("passed"), total - outcomes.count("no_tests"), detail)


def _is_over(result, limits):
    """Whether the other tests need not run: after a timeout they would only cost the same again."""
    failed = result[0] not in ("passed", "no_tests")
    return result[0] in ("timeout", "compile_error") or failed and limits["fail_fast"]


def _run_stdin(program, tests, limits):
    """Results [outcome, detail] of stdin tests, fewer where the rest need not run.

    First all are played in one process, at the cost of one, in little time, since endless loops will cost it again. A
    right output is a pass, and the first test had a process of its own. Another that failed may have been spoiled by one
    before it: it gets its own process."""
    together = _play(program, tests, limits | {"timeout": limits["timeout"] / 8}) if 1 < len(tests) <= 16 else []
    results = []
    for i, test in enumerate(tests):
        known = together and (i == 0 or together[i][0] == "passed")
        results += [together[i]] if known else _play(program, [test], limits)
        if _is_over(results[-1], limits):
            break
    return results


def _play(program, tests, limits):
    """Results of stdin tests that share a process; none where it is not known in which of them it ended badly."""
    wanted = [_bytes(test["output"]) for test in tests]
    contents = [content for test in tests for content in (_bytes(test["input"]), b"")]
    end, files = _run(program, contents, max(map(len, wanted)), limits)
    if end[0] != "passed":
        return [end] if len(tests) == 1 else []
    results = []
    for right, said in zip(wanted, files[1::2]):
        tokens, expected = said.split(), right.split()
        same = len(tokens) == len(expected) and all(map(_same, tokens, expected))
        results.append(end if same else ["failed_test", f"expected {right[:80]!r}, printed {said[:80]!r}"])
    return results


def _bytes(text):
    return text.encode("utf-8", "surrogatepass")


_POINT = re.compile(rb"(?!-0*\.0*(?:e|$))-?[0-9]{1,200}\.[0-9]{1,200}(?:e[-+]?[0-9]{1,2})?")


def _same(said, wanted):
    """Exact, but for decimals where both have a point: programs print them in several ways."""
    if said == wanted:
        return True
    decimals = [float(token) for token in (said, wanted) if _POINT.fullmatch(token)]
    return len(decimals) == 2 and math.isclose(*decimals, rel_tol=1e-6)


def _run_asserts(program, asserts, limits):
    """Results of asserts: the judge reports a line for each that it has done."""
    end, (_, report) = _run(program, [_bytes(json.dumps(asserts)), b""], 6000 * len(asserts), limits | {"asserts": True})
    results = [json.loads(line) for line in report.splitlines()]
    if results and _is_over(results[-1], limits):
        return results
    if end[0] == "passed":                                        # the judge may have met a limit, too
        end = ["runtime_error", "ended before this test was done"]
    elif len(results) == len(asserts):
        results.pop()                                             # it must also end well
    return results + [end] * (1 if end[0] == "timeout" else len(asserts) - len(results))


def _run(program, contents, longest, limits):
    """One run with files of these contents -> how the program ended [outcome, detail], and what the files hold then: of
    each enough to compare it with `longest` bytes."""
    reply, (_, errors, *files) = _ask(limits, [_bytes(program), b"", *contents], keep=65536 + 4 * longest)
    detail = errors[-400:].decode("utf-8", "replace").rpartition("\n")[2][:200]
    code = reply["code"]
    if reply["late"] or code == -signal.SIGPROF:
        return ["timeout", f"over {limits['timeout']} s of CPU, or it waited for as long"], files
    outcome = _STATUS.get(code, "runtime_error")
    return [outcome, "" if outcome == "passed" else detail or f"ended with status {code}"], files


def _ask(job, contents, keep):
    """Lets a helper do a job on files of these contents -> its reply, and the first `keep` bytes of each file then. A
    helper that is lost (the kernel was out of memory, someone killed it) says nothing about the program: others try."""
    idle = _idle.setdefault(os.getpid(), [])                      # a fork of this process has helpers of its own
    for _ in range(_ATTEMPTS):
        # Files without a name. Unlike pipes they never block, RLIMIT_FSIZE bounds them, and open(0) and seek work.
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(os.memfd_create("verify"), "w+b")) for _ in contents]
            for file, content in zip(files, contents):
                file.write(content)
                file.seek(0)
            try:
                helper = idle.pop()                               # atomic
            except IndexError:
                helper = Helper()
            try:
                reply = helper.ask(job, [file.fileno() for file in files])
            except OSError:
                helper.close()
                continue
            idle.append(helper)
            return reply, [os.pread(file.fileno(), keep, 0) for file in files]
    if not contents[0]:
        raise SandboxError(f"{_ATTEMPTS} helpers died in a row; the first may have said why on stderr")
    layers()                                                      # helpers live, but not with this program
    said = f"{_ATTEMPTS} helpers died with it in a row".encode()
    return {"code": 1, "late": False}, [b"", said] + [b""] * (len(contents) - 2)


# ---------------------------------------------------------------- helpers, seen from the trainer

WALLS = {"seccomp": "processes, signals, sockets, ptrace, chmod: all calls but some 120 (x86_64 and aarch64)",
         "landlock": "the user's files and /proc (Linux 5.13); without it no file can be written, but files can be read"}
_ATTEMPTS = 10                                                    # helpers for one run, each after the loss of the last
_PATIENCE = 30                                                    # seconds beyond a run until a helper counts as hung
_without = set()                                                  # walls to leave out, for tests
_idle = {}                                                        # process id -> helpers that wait
_warned = threading.Lock()                                        # taken once, never released
_FILE = os.path.abspath(__file__)


class Helper:
    """A clean, warm interpreter that forks itself for every run. It ends when its channel, its stdin, closes."""
    def __init__(self):
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"run_programs needs Linux, this platform is {sys.platform}; use WSL 2, or a container")
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -S: no site-packages, a quick start. Not -I, which ignores PYTHONHASHSEED and so makes set order random.
        command = [sys.executable, "-s", "-S", "-B", _FILE, "helper", *_without]
        environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TZ": "UTC", "LD_BIND_NOW": "1",
                       "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        # A session of its own: Ctrl-C is for the trainer.
        self.process = subprocess.Popen(command, env=environment, cwd="/", stdin=theirs, stdout=subprocess.DEVNULL,
                                        start_new_session=True)
        theirs.close()

    def ask(self, job, files):
        """Sends a job and descriptors, returns the reply. OSError for a helper that is dead or hangs."""
        self.channel.settimeout(7 * job["timeout"] + _PATIENCE)
        socket.send_fds(self.channel, [json.dumps(job).encode()], files)
        message = self.channel.recv(1 << 16)
        if not message:
            raise ConnectionError("it died")
        reply = json.loads(message)
        if "error" in reply:
            raise SandboxError(reply["error"])
        missing = [f"{name} ({what})" for name, what in WALLS.items() if name not in reply["walls"]]
        if missing and _warned.acquire(blocking=False):
            print(f"verify.py: the sandbox runs without {' and '.join(missing)}", file=sys.stderr)
        return reply

    def close(self):
        self.channel.close()
        self.process.kill()
        self.process.wait()


def layers() -> list[str]:
    """The names of the WALLS that this machine gives. SandboxError."""
    return _ask({"timeout": 5, "memory_mb": 1024}, [b""] * 4, keep=0)[0]["walls"]


# ---------------------------------------------------------------- inside the helper

_COMPILE, _MEMORY = 201, 202                      # exit statuses; a program that takes one only says that it failed
_STATUS = {0: "passed", _COMPILE: "compile_error", _MEMORY: "memory", -signal.SIGKILL: "memory"}
_SCRATCH = 16 << 20                               # bytes that the files of a run may have


def serve() -> None:
    """One job at a time, until the trainer closes the channel."""
    builtins.exit = builtins.quit = sys.exit                      # honest programs use them, -S leaves them out
    for name in (*MODULES, "statistics", "typing"):
        __import__(name)                                          # once here, not in every fork
    del sys.path[0]                                               # the folder of this file
    sys.argv[:] = ["program.py"]
    sys.set_int_max_str_digits(0)
    for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)                     # whoever started the trainer may have ignored them
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD])
    os.dup2(0, 3)
    os.dup2(1, 0)                                                 # /dev/null: no child shall find the channel there
    os.closerange(4, 4096)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_STACK, 64 << 20)                       # deep recursion
    scratch = "namespaces" not in _without and _own_scratch()
    os.chdir("/dev/shm" if scratch else "/")
    rules = None if "landlock" in _without else _landlock(scratch)
    walls = {"landlock": rules, "seccomp": None if "seccomp" in _without else _seccomp(rules is not None)}
    libc.prctl(4, 0, 0, 0, 0)                                     # PR_SET_DUMPABLE: nobody reads its memory, nor a child's
    gc.freeze()                                  # a collection in a child would write to, and so copy, every page
    channel = socket.socket(fileno=3)
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 16, 40)
        if not message:
            os._exit(0)
        reply = _work(json.loads(message), files, walls)
        for entry in os.scandir() if scratch else ():
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        channel.send(json.dumps(reply | {"walls": [name for name in walls if walls[name] is not None]}).encode())


def _work(job, files, walls):
    """A run in new processes; closes the files. The judge comes first, and its files are closed before the program
    starts, which shall not find them."""
    program, errors, *others = files
    if "asserts" in job:
        ours, theirs = (end.detach() for end in socket.socketpair())
        judge = _spawn(job, walls, ours, errors, lambda: _check_asserts(*others, theirs))
        for fd in (ours, *others):
            os.close(fd)
        others = [theirs]
        child = _spawn(job, walls, theirs, errors, lambda: _answer_asserts(program))
    else:
        child = judge = _spawn(job, walls, None, errors, lambda: _play_tests(program, others))
    for fd in (program, errors, *others):
        os.close(fd)
    ended, late = _wait({judge, child}, job["timeout"])
    code, cpu = ended[child]
    return {"code": code, "late": late or cpu > job["timeout"]}


def _wait(pids, timeout):
    """Waits for children, and kills them when they wait too long -> {pid: (exit code, CPU seconds)}, whether late."""
    started, ended, late = time.monotonic(), {}, False
    while running := pids - ended.keys():
        signal.sigtimedwait([signal.SIGCHLD], 0.1)
        cpu = sum(time.clock_gettime(~pid << 3 | 2) for pid in running)           # the CPU clocks of processes
        late = late or time.monotonic() - started > 0.5 + timeout + 5 * cpu
        for pid in running:
            if late:
                os.kill(pid, signal.SIGKILL)
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return ended, late


def _spawn(job, walls, link, errors, work):
    """Forks a child that puts up the walls, then works. Descriptor 3 is its link to the judge or the program."""
    helper, pid = os.getpid(), os.fork()
    if pid:
        return pid
    try:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)                    # PR_SET_PDEATHSIG: die with the helper
        if os.getppid() != helper:                                # it is dead already
            os._exit(1)
        _limit(resource.RLIMIT_AS, job["memory_mb"] << 20)
        _limit(resource.RLIMIT_FSIZE, _SCRATCH)
        _limit(resource.RLIMIT_CPU, int(job["timeout"]) + 1)      # in whole seconds: it backs up the timer
        _put_up(**walls)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.setitimer(signal.ITIMER_PROF, job["timeout"])
        random.seed(0)                                            # verdicts shall not depend on luck
        os.dup2(errors, 2)
    except BaseException as error:
        os.write(3, json.dumps({"error": f"the sandbox failed: {error!r}"}).encode())
        os._exit(1)
    os.close(3) if link is None else os.dup2(link, 3)
    try:
        work()
    finally:
        os._exit(1)


def _fail(status, error, write=os.write, leave=os._exit):
    """Ends a program. (Bound now: it may have replaced them.)"""
    write(2, f"\n{_describe(error)}".encode("utf-8", "replace"))
    leave(_MEMORY if isinstance(error, MemoryError) and status == 1 else status)


def _describe(error):
    try:
        return " ".join(f"{type(error).__name__}: {error}"[:200].split())
    except BaseException:                                         # a __str__ of the program
        return type(error).__name__


def _read_file(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "surrogatepass")


def _load(source, name):
    """A program's code, and the names of the new, empty module in which it shall run."""
    try:
        code = compile(_read_file(source).lstrip("\ufeff"), "<program>", "exec", dont_inherit=True)
    except BaseException as error:                                # SyntaxError, null bytes, nesting too deep
        _fail(_COMPILE, error)
    module = sys.modules[name] = sys.modules["__main__"] = types.ModuleType(name)
    module.__file__ = "program.py"
    return code, module.__dict__


def _play_tests(source, files):
    """The program as __main__, once for each pair of files, stdin and stdout, and what Python does at its end."""
    leave = os._exit
    plain = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n", "closefd": False}
    for given, printed in zip(files[::2], files[1::2]):
        os.dup2(given, 0)
        os.dup2(printed, 1)
        sys.stdin = sys.__stdin__ = open(0, **plain)
        sys.stdout = sys.__stdout__ = open(1, "w", **plain)
        code, names = _load(source, "__main__")
        try:
            try:
                exec(code, names)
            except SystemExit as stop:
                if stop.code not in (None, 0):
                    raise
            if printed == files[-1]:
                threading._shutdown()                             # a second call would not wait
            elif threading.active_count() > 1:
                leave(1)                                          # what goes on would disturb the next test
            atexit._run_exitfuncs()
            _flush(sys.stdout)
            _flush(sys.__stdout__)
            sys.stdout = sys.__stdout__
            names.clear()                                         # finalizers run, files of the program are flushed
            gc.collect()
            _flush(sys.__stdout__)
            random.seed(0)
        except BaseException as error:
            _fail(1, error)
    leave(0)


def _flush(stream):
    with contextlib.suppress(ValueError):                         # it is closed, or was detached
        stream.flush()


# ---------------------------------------------------------------- asserts: a judge asks the program
#
# The judge calls the program's functions, objects and methods by name; a line of JSON each way. Data crosses as such
# (subclasses as their base), and lists, dicts, sets and deques among the arguments of a call come back as it left them.
# Anything else stays where it is: the judge has its number, can call it, read and set its attributes, and iterate. No
# operator asks it anything, so that an __eq__ or a __sub__ that always agrees is never called, and what a test compares
# with never reaches the program.

_LINE = 16 << 20                                                  # bytes of one value, at most
# Kinds of data, and from which arguments they are made again; integers in hexadecimal, for decimal is quadratic.
_DATA = {int: lambda value: [hex(value), 16], complex: lambda value: [value.real, value.imag],
         dict: lambda value: [list(value.items())]}
_DATA |= dict.fromkeys((bytes, bytearray, tuple, set, frozenset, collections.deque), lambda value: [list(value)])
_DATA |= dict.fromkeys((decimal.Decimal, Fraction, range, datetime.datetime, datetime.date, datetime.time,
                        datetime.timedelta), lambda value: list(value.__reduce__()[1]))
_KINDS = {kind.__name__: kind for kind in _DATA}
_METHODS = set().union(*map(dir, (str, bytes, list, dict, set, tuple, int, float)))


def _encode(value, other):
    """A value as JSON can hold it: numbers, text and lists as such, else {kind: arguments}, which `other` makes of what
    is no data."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_encode(item, other) for item in value]
    for kind, parts in _DATA.items():
        if isinstance(value, kind):
            return {kind.__name__: _encode(parts(value), other)}
    return other(value)


def _decode(line, find):
    """The value; `find` makes what is no data, of its kind and arguments."""
    def make(parts):
        [(kind, arguments)] = parts.items()
        return _KINDS[kind](*arguments) if kind in _KINDS else find(kind, *arguments)
    return json.loads(line, object_hook=make)


def _mutable(what, *arguments):
    """The arguments that a call may change, as it is seen outside."""
    args, kwargs = arguments[1:] if what == "call" else ((), {})
    return [value for value in (*args, *kwargs.values()) if isinstance(value, (list, dict, set, collections.deque))]


# What a test may do with an object; those after `enter` only with one of a class that the test names.
_OPERATIONS = {"call": lambda target, args, kwargs: target(*args, **kwargs), "get": getattr, "set": setattr,
               "iter": iter, "next": next, "enter": lambda target: target.__enter__(),
               "len": len, "str": str, "repr": repr, "bool": bool, "getitem": operator.getitem}


def _answer_asserts(source):
    """The program as a module, then its answers to the judge until that closes the link."""
    leave, kept = os._exit, {}                                    # the objects that the judge knows, by number
    code, names = _load(source, "program")
    operations = _OPERATIONS | {"name": names.__getitem__}

    def keep(value):
        kept[id(value)] = value
        return {"object": [id(value)]}

    def find(kind, *where):
        return kept[where[0]] if kind == "object" else getattr(sys.modules[where[0]], where[1])

    def answer(request):
        try:
            what, *arguments = _decode(request, find)
            value = operations[what](*arguments)
            return ["value", _encode(value, keep), _encode(_mutable(what, *arguments), keep)]
        except BaseException as error:
            return ["error", type(error).__name__, _describe(error)]

    try:
        exec("from typing import *\nfrom collections import *\n"  # as LeetCode gives them
             "import bisect, collections, functools, heapq, itertools, math", names)
        exec(code, names)
        with socket.socket(fileno=3).makefile("rwb") as judge:
            for request in judge:
                judge.write(json.dumps(answer(request)).encode() + b"\n")
                judge.flush()
        leave(0)
    except BaseException as error:                                # SystemExit too: then its asserts did not run
        _fail(1, error)


class _OfProgram(Exception):
    """An error of the program whose class only the program knows."""


class _Object:
    """An object of the program, in the judge. trust: 2 for what the test names in capitals, a class, 1 for its objects,
    0 for what a function returned: that answers for no str, list, set or dict."""
    def __init__(self, ask, number, trust):
        vars(self).update(_ask=ask, _number=number, _trust=trust)

    def __call__(self, *args, **kwargs):
        return self._ask(self._trust // 2, "call", self, args, kwargs)

    def __getattr__(self, name):
        value = None if name.startswith("__") else self._ask(self._trust, "get", self, name)
        if name.startswith("__") or type(value) is _Object and name in _METHODS and not self._trust:
            raise AttributeError(f"an object of the program is not asked for {name}")
        return value

    def __setattr__(self, name, value):
        self._ask(0, "set", self, name, value)

    def __bool__(self):
        return not self._trust or self._ask(0, "bool", self)

    def __exit__(self, *_):
        """The program is not told, so it cannot hide that an assert failed."""

    def __eq__(self, other):
        raise TypeError("objects of a program cannot be compared")


def _method(name):
    def method(self, *args):
        if not self._trust and name not in ("iter", "next", "enter"):
            raise TypeError(f"an object that a function returned is not asked for {name}")
        return self._ask(self._trust, name, self, *args)
    return method


for _name in "iter next enter len str repr getitem".split():
    setattr(_Object, f"__{_name}__", _method(_name))


class _Scope(dict):
    """The globals of a test: what it binds itself, else what is known here, else what the program calls so. A program
    that defines an `abs` that agrees is not asked for it. Only a test that names nothing else (MBPP: assert sum(10, 15)
    == 25) takes the first known name from the program."""
    def __init__(self, ask, names):
        super().__init__(__name__="__main__", eval=_evaluate)
        self.ask, self.asked = ask, False
        self.known = {*dir(builtins), *MODULES}
        self.all_known = self.known.issuperset(names)

    def __missing__(self, name):
        if name in self.known and (self.asked or not self.all_known):
            return sys.modules[name] if name in MODULES else getattr(builtins, name)
        self.asked = True
        return self.ask(2 * name[:1].isupper(), "name", name)


def _evaluate(text, *_):
    """eval for what a program returned: literals, and arithmetic without powers."""
    if re.fullmatch(r"(?!.*\*\*)[-+*/%(). 0-9]{1,200}", text):
        return eval(text, {"__builtins__": {}})
    return ast.literal_eval(text)


def _check_asserts(tests, report, theirs):
    """The judge: runs each statement, reports a line [outcome, detail]. It holds the asserts and none of the program."""
    os.close(theirs)                                              # else the link would not end with the program
    program = socket.socket(fileno=3).makefile("rwb")

    def ask(trust, *request):
        line = b""
        with contextlib.suppress(OSError):
            program.write(json.dumps(_encode(list(request), _outgoing)).encode() + b"\n")
            program.flush()
            line = program.readline(_LINE)
        if not line.endswith(b"\n"):
            os._exit(0)                                           # the program is gone; how it ended is the verdict
        kind, said, more = _decode(line, lambda kind, number: _Object(ask, number, trust))
        if kind == "value":
            for old, new in zip(_mutable(*request), more):
                old.clear()
                (old.extend if hasattr(old, "extend") else old.update)(new)
            return said
        raised = getattr(builtins, said, None)                    # so that a test can expect a ValueError
        known = isinstance(raised, type) and issubclass(raised, Exception)
        raise (raised if known else _OfProgram)(more.partition(": ")[2])

    for statement in json.loads(_read_file(tests)):
        try:
            code = compile(statement, "<assert>", "exec", dont_inherit=True)
            scope = _Scope(ask, code.co_names)
            exec(code, scope)
            result = "passed" if scope.asked else "no_tests", ""
        except BaseException as error:                            # TypeError: of a kind that cannot be compared
            outcomes = {AssertionError: "failed_test", TypeError: "failed_test", MemoryError: "memory"}
            outcome = outcomes.get(type(error), "runtime_error")
            result = outcome, f"{' '.join(statement[:80].split())}: {_describe(error)}"
        os.write(report, json.dumps(result).encode() + b"\n")
    os._exit(0)


def _outgoing(value):
    """What crosses to the program of an argument that is no data: the number of one of its objects, the name of a
    function or class that it has too."""
    if type(value) is _Object:
        return {"object": [value._number]}
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", "")
    if getattr(sys.modules.get(module), name, None) is value:
        return {"known": [module, name]}
    raise TypeError(f"a {type(value).__name__} of the test cannot cross to the program")


# ---------------------------------------------------------------- the walls

# System calls that are admitted, with their numbers on x86_64 and aarch64 (- where it has none). Those behind a colon
# with these values of one argument only: its place, then the values in hexadecimal. clone: threads; prlimit64: of
# itself; socketpair: streams, which go nowhere else; fcntl: no F_SETOWN, which can signal others; ioctl: isatty and the
# like.
_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57, dup 32 23,
dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49,
fchdir 81 50, getdents64 217 61, ftruncate 77 46, fsync 74 82, fdatasync 75 83, flock 73 32, mmap 9 222, munmap 11 215,
mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, rt_sigtimedwait 128 137, sigaltstack 131 132, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, futex 202 98,
set_robust_list 273 99, rseq 334 293, gettid 186 178, getpid 39 172, getppid 110 173, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getpgid 121 155, gettimeofday 96 169, time 201 -, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, getitimer 36 102, setitimer 38 103, alarm 37 -,
pause 34 -, times 100 153, getrusage 98 165, getrlimit 97 163, setrlimit 160 164, getrandom 318 278, uname 63 160,
sysinfo 99 179, sched_yield 24 124, sched_getaffinity 204 123, membarrier 324 283, sendto 44 206, recvfrom 45 207,
shutdown 48 210, getsockopt 55 209, getsockname 51 204, exit 60 93, exit_group 231 94, restart_syscall 219 128,
umask 95 166, sendfile 40 71, clone 56 220: 0 3d0f00 7d0f00, prlimit64 302 261: 0 0,
socketpair 53 199: 1 1 801 80001 80801, fcntl 72 25: 1 0 1 2 3 4 5 6 7 406, ioctl 16 29: 1 5401 5413 541b 5421 5450 5451"""
# Where files can be written, and where not: then they are opened with flags of reading only, folders too.
_WRITING = """, open 2 -, openat 257 56, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, truncate 76 45,
mkdir 83 -, mkdirat 258 34, rmdir 84 -"""
_READING = """, open 2 -: 1 0 80000 8000 88000 90800 98800,
openat 257 56: 2 0 80000 8000 88000 20000 a0000 90800 98800 84800 a4800"""
_ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}           # place of the number, AUDIT_ARCH
# What a program may read: libraries and time zones.
_READABLE = (os.path.dirname(os.__file__), sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64",
             "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def _limit(kind, value):
    """A resource limit for good, unless there is a lower one already."""
    hard = resource.getrlimit(kind)[1]
    value = min(value, hard) if hard >= 0 else value
    resource.setrlimit(kind, (value, value))


def _own_scratch():
    """A /dev/shm of this process and its children, where user namespaces are allowed: its files end with the helper."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000) != 0:                # a user and a mount namespace
        return False
    libc.prctl(4, 1, 0, 0, 0)                                     # PR_SET_DUMPABLE: a plain user may write the maps
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    # Private mounts; nosuid, nodev, noexec, and few files: folders in folders stay removable.
    return libc.mount(b"none", b"/", None, 0x44000, None) == 0 == libc.mount(
        b"tmpfs", b"/dev/shm", b"tmpfs", 14, f"size={_SCRATCH},nr_inodes=50".encode())


def _landlock(scratch):
    """Rules under which a process opens nothing but libraries, four devices, and files in its own /dev/shm; None where
    the kernel has no Landlock."""
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return None
    every = (1 << 13 + (abi > 1) + (abi > 2) + (abi > 4)) - 1     # 13 rights, then REFER, TRUNCATE, IOCTL_DEV
    rules = libc.syscall(444, struct.pack("Q", every), 8, 0)
    rights = dict.fromkeys(_READABLE, 4 | 8) | dict.fromkeys(_DEVICES, 2 | 4)          # read, list; write, read
    rights |= {"/dev/shm": every} if scratch else {}
    for path in filter(os.path.exists, rights):
        fd = os.open(path, os.O_PATH)
        libc.syscall(445, rules, 1, struct.pack("=Qi", rights[path], fd), 0)
        os.close(fd)
    return rules


def _seccomp(may_write):
    """A filter (BPF) which refuses every system call but _CALLS; None where it has no table."""
    if os.uname().machine not in _ARCHITECTURES:
        return None
    place, architecture = _ARCHITECTURES[os.uname().machine]
    load, equal, leave, admit, kill = 0x20, 0x15, 0x06, 0x7FFF0000, 0x80000000
    refuse = 0x50000 | 38                        # ENOSYS: then the C library falls back from clone3 to clone
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    for call in (_CALLS + (_WRITING if may_write else _READING)).split(","):
        name, _, check = call.partition(":")
        argument, *values = check.split() or ["0"]
        body = [(load, 0, 0, 16 + 8 * int(argument))]
        for value in values:
            body += [(equal, 0, 1, int(value, 16)), (leave, 0, 0, admit)]
        body.append((leave, 0, 0, refuse if values else admit))
        if name.split()[place] != "-":
            code += [(equal, 0, len(body), int(name.split()[place])), *body]
    code.append((leave, 0, 0, refuse))
    return ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))


def _put_up(landlock, seccomp):
    """Walls off this process for good. What both ask of a plain user is PR_SET_NO_NEW_PRIVS; root, whose rights would
    lift limits, loses all rights."""
    failed = libc.prctl(38, 1, 0, 0, 0)
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if landlock is not None:
        failed |= libc.syscall(446, landlock, 0)
        os.close(landlock)                                        # a program shall not add to the rules of the next
    if seccomp is not None:
        failed |= libc.prctl(22, 2, struct.pack("HP", len(seccomp) // 8, ctypes.addressof(seccomp)), 0, 0)
    if failed:
        raise OSError(ctypes.get_errno(), "a wall cannot be put up")


# ---------------------------------------------------------------- command line

if __name__ == "__main__":
    if sys.argv[1:2] == ["helper"]:
        _without.update(sys.argv[2:])
        serve()
    for name, what in WALLS.items():                              # python verify.py: which walls this machine gives
        print(f"{'yes' if name in layers() else 'NO ':3}  {name:8}  {what}")
