"""The texts of the report in each language, by name; fields are in braces."""
