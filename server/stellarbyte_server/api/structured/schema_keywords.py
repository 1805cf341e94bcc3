"""The keywords of JSON Schema, by their treatment in the grammar, and the bounds of a schema."""

MAX_SCHEMA_BYTES = 65_536
MAX_DEPTH = 32
MAX_TEXT_LENGTH = 4_096
MAX_PROPERTIES = 1_000
MAX_COUNTED_PROPERTIES = 100  # if minProperties or maxProperties is used
MAX_PATTERN_PROPERTIES = 32
MAX_BRANCHES = 500
MAX_PATTERNS_AT_ONCE = 3
MAX_MULTIPLE = 10_000
MAX_COUNT = 2**31 - 1
MAX_NUMBER = 2**53

DRAFTS = ("draft-07/schema", "draft/2019-09/schema", "draft/2020-12/schema")
ANNOTATIONS = frozenset(
    "$comment title description default examples example deprecated readOnly writeOnly contentMediaType"
    " contentEncoding discriminator externalDocs xml".split()
)

# Enforced: with one subschema, a list of subschemas, or subschemas by name; then with plain values.
ONE = frozenset(("items", "additionalItems", "additionalProperties"))
MANY = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))
COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())

# Known but not enforced, of the same kinds.
ONE_APART = frozenset(
    "not if then else contains propertyNames unevaluatedItems unevaluatedProperties contentSchema".split()
)
NAMED_APART = frozenset(("dependentSchemas", "dependentRequired", "dependencies"))
COUNTS_APART = frozenset(("minContains", "maxContains"))
REFERENCES_APART = frozenset(("$dynamicRef", "$recursiveRef"))
# The unenforced keywords that are assertions without another keyword.
ASSERTIONS_APART = frozenset(
    "not if contains propertyNames unevaluatedItems unevaluatedProperties dependentSchemas dependentRequired"
    " dependencies $dynamicRef $recursiveRef".split()
)
