"""The languages of the report."""

from collections.abc import Mapping

from stellarbyte.analysis.words.chinese import CHINESE
from stellarbyte.analysis.words.english import ENGLISH

LANGUAGES: Mapping[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}
