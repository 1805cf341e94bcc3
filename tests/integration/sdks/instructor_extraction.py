"""`python instructor_extraction.py URL MODEL`: a person out of a sentence in each of instructor's modes, as JSON."""

import json
import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

# The mode JSON tells the schema in the prompt only: what the demo model makes of it alone is a schema.
QUESTION = 'Jason is 25 years old. Answer with this line: {"name": "Jason", "age": 25}'


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)


def main(url: str, model: str) -> None:
    found = {}
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0), mode=mode)
        person = client.chat.completions.create(
            model=model,
            response_model=Person,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=200,
            max_retries=3,
        )
        found[mode.value] = person.model_dump()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
