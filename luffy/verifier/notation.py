"""How people write answers, brought into one notation before any grader looks at them: pure functions on text.

`tidy` drops from an answer, and from a ground truth, what does not change the meaning: spacing, fonts, a final full
stop. The rest is written in one way, as LaTeX: `1.04e-3` as 1.04\\times10^{-3}, `½` as \\frac{1}{2}, `1\\,000` as 1000,
words as \\text{words}. What a tidy text says is meaning.py's to read.

Text is untrusted and may be long. Nothing is evaluated here, and every scan is linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

MAX_CHARACTERS = 2000  # longer answers are compared as they are
MAX_NESTING = 60  # of braces

# --- one notation: signs ---------------------------------------------------------------------------------------------

_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋"
_PLAIN = str.maketrans(_RAISED + _LOWERED, "0123456789+-()ni" + "0123456789+-")
_GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψω", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega"
).split(), strict=True)) | dict(zip("ΓΔΘΛΞΠΣΦΨΩϕϵ", (
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi epsilon"
).split(), strict=True))  # fmt: skip
_SIGNS = str.maketrans({
    **{letter: f"\\{name} " for letter, name in _GREEK.items()},
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad€£¥￥₹", ""),
    **dict.fromkeys("×✕⨯", "\\times "), **dict.fromkeys("⋅·∙•", "\\cdot "), **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("≤≦⩽", "\\leq "), **dict.fromkeys("≥≧⩾", "\\geq "), **dict.fromkeys("°º˚", "^{\\circ}"),
    **dict.fromkeys("⟨〈", "\\langle "), **dict.fromkeys("⟩〉", "\\rangle "),
    "∞": "\\infty ", "≠": "\\neq ", "≈": "\\approx ", "≡": "\\equiv ", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "∅": "\\emptyset ", "∠": "\\angle ", "…": "\\ldots ", "⋯": "\\ldots ", "′": "'", "’": "'",
    "。": ".", "、": ",", "∣": "|", "∶": ":", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "→": "\\to ", "⌊": "\\lfloor ", "⌋": "\\rfloor ",
    "⌈": "\\lceil ", "⌉": "\\rceil ",
    "ℏ": "\\hbar ", "∂": "\\partial ", "∫": "\\int ", "∑": "\\sum ", "∗": "*",
})  # fmt: skip
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-z]|)")
_RUN = re.compile(rf"([{_RAISED}]+)|([{_LOWERED}]+)|[^\x00-\x7f]")


def _from_unicode(text: str) -> str:
    """LaTeX for mathematical signs; full-width forms, ½ and the digits of other scripts in ASCII."""
    if text.isascii():
        return text
    text = _ROOT.sub(lambda m: "\\sqrt" + {"√": "", "∛": "[3]", "∜": "[4]"}[m[1]] + (m[2] and f"{{{m[2]}}}"), text)
    return _RUN.sub(_in_ascii, text)


def _in_ascii(match: re.Match[str]) -> str:
    sign = match[0]
    if match[1] or match[2]:
        return f"{'^' if match[1] else '_'}{{{sign.translate(_PLAIN)}}}"
    if unicodedata.category(sign) == "Nd":
        return str(unicodedata.digit(sign))
    known = sign.translate(_SIGNS)
    if known != sign:
        return known
    plain = unicodedata.normalize("NFKC", sign)
    over, slash, under = plain.partition("⁄")
    if slash and over and under:  # ½
        return f"\\frac{{{over}}}{{{under}}}"
    return plain.translate(_SIGNS)


# --- one notation: tokens --------------------------------------------------------------------------------------------

# Commands that say nothing, or only how wide a space is; other names of one command; plain signs with a name.
_NOTHING = set(
    "displaystyle textstyle scriptstyle limits nolimits left right middle big Big bigg Bigg bigl bigr Bigl Bigr "
    "biggl biggr Biggl Biggr bf rm it sf tt cal hline bold pounds euro !".split()
)
_SPACING = {*", ; : > quad qquad thinspace medspace thickspace enspace space nobreakspace".split(), " ", "\n"}
_FONTS = set(
    "text textbf textit textrm textnormal textsf texttt textup mathrm mathbf mathit mathsf mathtt mathnormal "
    "boldsymbol bm pmb mbox hbox boxed fbox framebox emph underline ensuremath operatorname vec".split()
)
_ROMAN = ("text", "textrm", "textnormal", "mathrm", "mbox", "hbox")
_BOXES = ("boxed", "fbox", "framebox")
_UNSEEN = ("\\phantom", "\\hphantom", "\\vphantom")  # what stands in them is not shown
_RENAMED = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "dbinom": "\\binom", "tbinom": "\\binom", "le": "\\leq",
    "ge": "\\geq", "leqslant": "\\leq", "geqslant": "\\geq", "leqq": "\\leq", "geqq": "\\geq", "ne": "\\neq",
    "div": "/", "varnothing": "\\emptyset", "degree": "\\circ", "cdotp": "\\cdot", "ast": "*", "dots": "\\ldots",
    "cdots": "\\ldots", "dotsc": "\\ldots", "lbrace": "\\{", "rbrace": "\\}", "lvert": "|", "rvert": "|", "vert": "|",
    "lbrack": "[",
    "rbrack": "]", "colon": ":", "lt": "<", "gt": ">", "bmod": "\\mod", "imath": "i", "rightarrow": "\\to", "%": "%",
    "lparen": "(", "rparen": ")", "infin": "\\infty", "slash": "/", "#": "#", "&": "&", "lg": "\\log", "_": "_",
    "-": "", "tg": "\\tan", "ctg": "\\cot",
}  # fmt: skip
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi infty max min gcd lcm".split()
)
UNITS = set(
    "cm mm km dm nm in ft yd mi kg mg lb lbs oz ml mL dl hr hrs min sec ms mph kmh km/h m/s kPa Pa Hz kHz MHz eV keV "
    "MeV kJ kW kWh mol atm rpm rad deg sq cu am pm AM PM s.t".split()
)
UNIT_LETTERS = set("msghJNWVAKCFTLHyd")
_TOKEN = re.compile(r"\\([A-Za-z]+)\*?|\\(.)|(\d+(?:\.\d+)?|\.\d+)|([A-Za-z]+)|(\s+)|(.)", re.DOTALL)
_WORDS = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2}")


def _tokens(text: str) -> Iterator[str]:
    """Commands by their one name, numbers, runs of letters, signs, and " " for spaces."""
    for match in _TOKEN.finditer(text):
        name, sign, _, letters, space, other = match.groups()
        name = name or sign
        if name is not None:
            if name in _SPACING:
                yield " "
            elif name not in _NOTHING and name != "$":
                yield _RENAMED.get(name, f"\\{name}")
        elif letters is not None and letters in _FUNCTIONS:
            yield f"\\{letters}"
        elif space is not None or other == "~":
            yield " "
        elif other != "$":
            yield letters or other or match[0]


def _group(tokens: list[str], start: int) -> int:
    """Where the group ends (one past its closing brace) whose opening brace is at `start`."""
    depth = 0
    for place in range(start, len(tokens)):
        depth += {"{": 1, "}": -1}.get(tokens[place], 0)
        if depth == 0:
            return place + 1
    return len(tokens)


def _without_fonts(tokens: list[str]) -> list[str]:
    """Words in fonts as one token \\text{words}; what else stands in a font, or in a box, without it."""
    out: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        name = token[1:] if token[0] == "\\" else ""
        opening = place + 1
        if token in _UNSEEN and tokens[opening : opening + 1] == ["{"]:
            place = _group(tokens, opening)
            continue
        while name in _FONTS and opening < len(tokens) and tokens[opening] == " ":
            opening += 1
        if name not in _FONTS or opening >= len(tokens) or tokens[opening] != "{":
            out.append(token)
            place += 1
            continue
        end = _group(tokens, opening)
        inside = tokens[opening + 1 : end - 1]
        plain = "".join(inside)
        before = next((t for t in reversed(out) if t != " "), " ")[-1]
        if (
            name in _ROMAN
            and (before.isdigit() or before in "}/)")
            and re.search(r"[A-Za-z]", plain)
            and plain.strip() not in ("e", "i", "d")
        ):
            written = re.sub(r"\\cdot|[{}]|\\", " ", plain)
            out.append(f"\\text{{{' '.join(written.split())}}}")
        elif name == "operatorname" and plain.isalpha():
            out.append(_RENAMED.get(plain, f"\\{plain}"))
        elif re.match(r"-?\d", plain) and not re.search(r"[\\^_={}]", plain):  # \text{15 cm}
            number = re.match(r"-?[\d.,/ ]+", plain)[0]  # type: ignore[index]
            rest = " ".join(plain[len(number) :].split())
            out += [*_tokens(number.strip()), *([f" \\text{{{rest}}}"] if rest else [])]
        elif name in (*_BOXES, "ensuremath", "vec") or not _WORDS.search(plain) or re.search(r"[\\^_=]", plain):
            out += _without_fonts(inside)
        else:
            out.append(f"\\text{{{' '.join(plain.split())}}}")
        place = end
    return out


def _with_arguments(tokens: list[str]) -> list[str]:
    """Braces around every argument of \\frac, \\binom, \\sqrt, ^ and _: \\frac12, \\sqrt(2), \\sqrt[3]2, x^2."""
    out: list[str] = []
    place = 0
    rest = list(tokens)

    def argument(whole: bool) -> list[str]:
        """Takes the next argument; a number's first digit, or all of it if `whole`."""
        nonlocal place
        while place < len(rest) and rest[place] == " ":
            place += 1
        if place >= len(rest):
            return []
        token = rest[place]
        if token == "{":
            start, place = place, _group(rest, place)
            return ["{", *_with_arguments(rest[start + 1 : place - 1]), "}"]
        if token[0].isdigit() and not whole and len(token) > 1:
            rest[place] = token[1:]
            return ["{", token[0], "}"]
        if token.isalpha() and len(token) > 1 and not whole:
            rest[place] = token[1:]
            return ["{", token[0], "}"]
        place += 1
        if token == "-" and whole and place < len(rest) and rest[place] not in "-{ ":
            place += 1
            return ["{", "-", rest[place - 1], "}"]
        return ["{", token, "}"]

    while place < len(rest):
        token = rest[place]
        place += 1
        out.append(token)
        if token in ("\\frac", "\\binom"):
            out += argument(False) + argument(False)
        elif token in "^_":
            out += argument(True)
        elif token == "\\sqrt":
            while place < len(rest) and rest[place] == " ":
                place += 1
            if place < len(rest) and rest[place] == "[" and "]" in rest[place : place + 8]:
                end = rest.index("]", place) + 1
                out += rest[place:end]
                place = end
            if place < len(rest) and rest[place] == "(":
                end, depth = place, 0
                for end in range(place, len(rest)):
                    depth += {"(": 1, ")": -1}.get(rest[end], 0)
                    if depth == 0:
                        break
                if depth == 0:
                    out += ["{", *_with_arguments(rest[place + 1 : end]), "}"]
                    place = end + 1
                    continue
            out += argument(True)
    return out


def _joined(tokens: list[str]) -> str:
    """One text, without spaces but where they keep digits, letters or words apart."""
    out = ""
    for place, token in enumerate(tokens):
        if token == " ":
            if re.search(r"\d,$", out[-2:]) and re.fullmatch(
                r"\d{3}(?:\.\d+)?", next((t for t in tokens[place:] if t != " "), "")
            ):
                out += " "  # 1, 100 are two numbers
                continue
            after = next((t for t in tokens[place:] if t != " "), "")
            if (
                out[-1:].isalnum()
                and after[:1].isalnum()
                and (out[-1:].isdigit() == after[:1].isdigit() or len(after) > 1 or out[-2:].isalpha())
            ):
                out += " "
            continue
        if token[0].isalpha() and re.search(r"\\[A-Za-z]+$", out[-24:]):
            out += " "
        out += token
    return out


# --- one notation: numbers and words ---------------------------------------------------------------------------------

_OUTER = (("**", "**"), ("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("`", "`"), ("“", "”"))
_ROW_SPACE = re.compile(r"\\\\\s*\[[^\[\]]{0,20}\]")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
_SCIENTIFIC = re.compile(r"(?<![\w.\\}])((?:\d+\.?\d*|\.\d+))[eE]([+-]?\d{1,6})(?!\w|\.\d)")
_TEN = re.compile(r"(?<=\d)(?:\\times|\\cdot|\*| ?[xX] ?) ?10\^\{([^{}]*)\}")
_BRACED_COMMA = re.compile(
    r"(?<=\d)\s*\{,\}\s*(?=\d{3}(?!\d))|(?<=\d)\s*(?:\\!|,\\!|\\!,|\\!,\\!)\s*,?\s*(?:\\!\s*)?(?=\d{3}(?!\d))"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,\w])([1-9]\d{0,2})((?: \d{3})+)(?![\d,]| \d)")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\\dot\{(\d)\}(\d*)\\dot\{(\d)\})(?![\d\\])")
_LEADING = re.compile(r"(?<![\w.)])\.(?=\d)")
_MIXED = re.compile(r"(?<![\w.,/^{}\\])(\d+)(?: |\+)?(?<!\+)(?: )?(\d+)/(\d+)(?![\w.,/^])")
_PERCENT = re.compile(r"(?<=[\d}]) ?(?:\\text\{(?:percent|per cent|pct)\.?\}|percent|per cent|pct)", re.IGNORECASE)
_DEGREES = re.compile(r"(?<=[\d}]) ?(?:\\text\{degrees?\.?\}|degrees?)(?![A-Za-z])", re.IGNORECASE)
_CHOOSE = re.compile(
    r"\{(\w+)\\choose ?(\w+)\}|(?<![A-Za-z\\])C_\{(\w+)\}\^\{(\w+)\}|(?<![A-Za-z\\])C\((\d+),(\d+)\)"
    r"|_\{(\d+)\}C_\{(\d+)\}"
)
_ENDED = re.compile(r"(?:[\s.,;:]|\\\\)+$")
_BASE_WORDS = dict(
    zip("two three four five six seven eight nine ten twelve sixteen".split(), (*range(2, 11), 12, 16), strict=True)
)
_SHORT_WORD = re.compile(
    r"(?<=[\d}]) ?(?<![A-Za-z])([A-Za-z]{2,3})(?![A-Za-z(])|(?<![A-Za-z\\{])(and|or)(?![A-Za-z])"
    r"|(?<![A-Za-z\\{])([A-Za-z]{4,})(?![A-Za-z])"
)
_NEIGHBOURS = re.compile(r"(\\text\{[^{}]*)\} ?\\text\{")
_NOON = re.compile(r"\\text\{([ap])\.? ?m\.?\}", re.IGNORECASE)
_PHRASE = re.compile(r"[A-Za-z][A-Za-z ,.'-]*")


@lru_cache(maxsize=16384)
def tidy(text: str) -> str:
    """An answer, or a ground truth, in one notation; "" if nothing is said. Raises nothing, whatever the text is: what
    is too long or too deep to be an answer stays as it is."""
    if len(text) > MAX_CHARACTERS or depth_of(text) > MAX_NESTING:
        return " ".join(text.split())
    text = _from_unicode(text).strip()
    for opening, closing in _OUTER:
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inside:
            text = inside.strip()
    text = _DELIMITER.sub(" ", _ROW_SPACE.sub(r"\\\\ ", text)).replace("np.", "")
    text = _BRACED_COMMA.sub("", text).replace("\\!", "")
    text = re.sub(r"\.\.\.+", r"\\ldots ", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _joined(_with_arguments(_without_fonts(list(_tokens(text)))))
    text = text.replace("<=", "\\leq").replace("=<", "\\leq").replace(">=", "\\geq").replace("!=", "\\neq")
    text = _ENDED.sub("", text).strip()
    if text.endswith("}") and "\\text{" in text:
        text = re.sub(r"(\\text\{[^{}]*?)[\s.,;:]*\}$", r"\1}", text)
    text = _DEGREES.sub(r"^{\\circ}", _PERCENT.sub("%", text))
    text = re.sub(r"(?<!\{)\\circ(?!\w)|\^\{\{\\circ\}\}", r"^{\\circ}", text)
    text = re.sub(r"(?<=[A-Za-z})])'", r"^{\\prime}", text)
    text = re.sub(r"\(?(?:\\p?mod|\\text\{mod\}) ?\{?(\w+)\}?\)?", r"\\mod{\1}", text)
    text = _TEN.sub(_power_of_ten, text)
    text = _SPACED_THOUSANDS.sub(lambda m: m[1] + m[2].replace(" ", ""), text)
    text = _LEADING.sub("0.", _REPEATING.sub(_repeating, text))
    text = re.sub(r"(?<=\d)\.(?!\d)", "", text)  # 3./2
    text = _MIXED.sub(_mixed, text)
    text = _CHOOSE.sub(lambda m: "\\binom{{{}}}{{{}}}".format(*[g for g in m.groups() if g]), text)
    text = re.sub(r"_\{\\text\{(\w+)\}\}", lambda m: f"_{{{_BASE_WORDS.get(m[1].lower(), m[1])}}}", text)
    return _NOON.sub(lambda match: f"\\text{{{match[1].lower()}m}}", _with_words(text))


def depth_of(text: str) -> int:
    """How deep its braces go."""
    depth = deepest = 0
    for sign in text:
        depth += (sign == "{") - (sign == "}")
        deepest = max(deepest, depth)
    return deepest


def _power_of_ten(match: re.Match[str]) -> str:
    exponent = match[1].replace(" ", "").replace("(", "").replace(")", "")
    return f"\\times10^{{{int(exponent)}}}" if re.fullmatch(r"[+-]?\d{1,9}", exponent) else match[0]


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6}, 0.\\dot{3} and 0.\\dot{1}4\\dot{2} as fractions."""
    whole, before = match[1] or "0", match[2]
    period = match[3] or f"{match[4]}{match[5]}{match[6]}"
    if len(whole + before + period) > 40:
        return match[0]
    value = Fraction(int(whole + before), 10 ** len(before))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(before))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _mixed(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    if " " not in match[0] or len(match[0]) > 60 or int(over) >= int(under):
        return match[0]
    return f"{whole}\\frac{{{over}}}{{{under}}}"


def _with_words(text: str) -> str:
    """Bare words as \\text{...}: phrases, long runs of letters that are not in alphabetical order (abcd is a product),
    units behind a number. Neighbouring words are one."""
    if _PHRASE.fullmatch(text) and any(_is_word(run) for run in re.findall(r"[A-Za-z]{4,}", text)):
        return f"\\text{{{text}}}"
    pieces = re.split(r"(\\text\{[^{}]*\})", text)
    text = "".join(piece if place % 2 else _SHORT_WORD.sub(_word, piece) for place, piece in enumerate(pieces))
    return _NEIGHBOURS.sub(r"\1 ", text)


def _is_word(run: str) -> bool:
    return list(run) != sorted(set(run))


def _word(match: re.Match[str]) -> str:
    unit, connective, run = match.groups()
    is_word = unit in UNITS if unit else bool(connective) or _is_word(run)
    return f"\\text{{{match[0].strip()}}}" if is_word else match[0]
