"""Where a text is cut before byte-level BPE: no merge crosses a cut.

A piece is, in this order of preference:
    a tag such as <think> or </div>
    a LaTeX command such as \\frac
    an English ending after an apostrophe, such as 's
    1 to `han` Chinese characters: phrases become tokens, whole sentences do not
    a word of other letters, with one space or sign before it: " word", "_name", ".append"
    1 to `digits` digits, so that numbers are written the same way wherever they stand
    the indentation of a line
    signs with one space before them: " +=", ")))"
    line ends
    other spaces, the last one before a word left to it
The pieces of a text are the text: nothing is left out, in whatever script.
"""

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

from stellarbyte.train.config.tokenizer import Splits

_LONGEST_WORD = 32  # letters; scripts without spaces and encoded bytes have longer runs


def pattern(splits: Splits) -> str:
    """The regular expression of a piece, for Oniguruma and for the module `regex`."""
    letter = r"(?:(?!\p{Han})[\p{L}\p{M}])"
    tag, command = r"</?[A-Za-z][A-Za-z0-9_-]{0,31}/?>", r"\\[A-Za-z]{1,32}"
    return "|".join(
        [
            tag,
            command,
            r"'(?:[sdmt]|ll|ve|re)(?![A-Za-z])",
            rf"\p{{Han}}{{1,{splits.han}}}",
            rf"[ !-/:-@\[-`{{-~]?{letter}{{1,{_LONGEST_WORD}}}",
            rf"\p{{N}}{{1,{splits.digits}}}",
            r"(?<=[\r\n])[ \t]{1,32}(?=[^\s])",
            rf" ?(?:(?!{tag}|{command})[^\s\p{{L}}\p{{M}}\p{{N}}]){{1,16}}",
            r"[\r\n]{1,16}",
            r"[^\S\r\n]{1,32}(?=[^\S\r\n]\S|[\r\n]|$)",
            r"[\s\S]",
        ]
    )


def pre_tokenizer(splits: Splits) -> pre_tokenizers.PreTokenizer:
    """Cuts a text into pieces of bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern(splits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def install(tokenizer: Tokenizer, splits: Splits) -> None:
    """Give a tokenizer these cuts and the decoder that undoes them."""
    tokenizer.pre_tokenizer = pre_tokenizer(splits)
    tokenizer.decoder = decoders.ByteLevel()
