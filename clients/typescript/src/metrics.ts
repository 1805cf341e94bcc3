// Reads Prometheus' text format.

import type { MetricSample } from "./answers.js";

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/; // a timestamp may follow the value
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"(?:,|$)/y;
const ESCAPED: Readonly<Record<string, string>> = { n: "\n" };

/** Parses a scrape; SyntaxError if a line is neither a comment nor a sample. */
export function parseMetrics(text: string): MetricSample[] {
  return text
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "" && !line.startsWith("#"))
    .map(parseSample);
}

function parseSample(line: string): MetricSample {
  const [, name, labels, value] = SAMPLE.exec(line) ?? [];
  if (name === undefined || value === undefined) throw notASample(line);
  return { name, labels: parseLabels(labels ?? "", line), value: parseValue(value, line) };
}

function parseLabels(text: string, line: string): Record<string, string> {
  const labels: [string, string][] = [];
  LABEL.lastIndex = 0;
  for (let end = 0; end < text.length; end = LABEL.lastIndex) {
    const [, name, value] = LABEL.exec(text) ?? [];
    if (name === undefined || value === undefined) throw notASample(line);
    labels.push([name, value.replace(/\\(.)/g, (_, character: string) => ESCAPED[character] ?? character)]);
  }
  return Object.fromEntries(labels);
}

function parseValue(text: string, line: string): number {
  const value = Number(text.replace("Inf", "Infinity"));
  if (Number.isNaN(value) && text !== "NaN") throw notASample(line);
  return value;
}

function notASample(line: string): SyntaxError {
  return new SyntaxError(`${JSON.stringify(line)} is no line of metrics`);
}
