// Metrics are read as Prometheus writes them; charts draw what was measured in the last minutes, with its gaps.

import assert from "node:assert/strict";
import { test } from "node:test";

import { pathOf, roundUp } from "../stellarbyte_web/chart.js";
import { History, Rate, WINDOW_MS } from "../stellarbyte_web/history.js";
import { parseMetrics, total } from "../stellarbyte_web/prometheus.js";

const SCRAPE = `# HELP vllm:num_requests_running Requests the engine is working on.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="a \\"b\\\\c\\nd}"} 3.0
vllm:e2e_bucket{le="+Inf",model_name="m"} 7 1700000000000
vllm:e2e_bucket{le="0.5",model_name="m",} 1e-3
nan_value NaN
big +Inf
  spaced   2
broken{a="b" 5
no value
`;

test("a scrape is its samples", () => {
  assert.deepEqual(parseMetrics(SCRAPE), [
    { name: "vllm:num_requests_running", value: 3 },
    { name: "vllm:e2e_bucket", value: 7 },
    { name: "vllm:e2e_bucket", value: 0.001 },
    { name: "nan_value", value: NaN },
    { name: "big", value: Infinity },
    { name: "spaced", value: 2 },
  ]);
  assert.equal(total(parseMetrics(SCRAPE), "vllm:e2e_bucket"), 7.001);
  assert.equal(total(parseMetrics(SCRAPE), "missing"), null);
});

test("a history forgets what is older than its window", () => {
  const history = new History();
  for (let timeMs = 0; timeMs <= 2 * WINDOW_MS; timeMs += 1000) history.add(timeMs, timeMs === WINDOW_MS ? 50 : 1);
  assert.equal(history.points.length, WINDOW_MS / 1000 + 1);
  assert.equal(history.max, 50);
  history.add(2 * WINDOW_MS + 1000, null);
  assert.equal(history.max, 1);
});

test("a rate is of two readings, and begins anew with its counter", () => {
  const rate = new Rate();
  assert.equal(rate.read(0, 10), null);
  assert.equal(rate.read(2000, 50), 20);
  assert.equal(rate.read(3000, 5), null);
  assert.equal(rate.read(4000, 6), 1);
  assert.equal(rate.read(5000, null), null);
  assert.equal(rate.read(6000, 9), null);
  assert.equal(rate.read(7_206_000, 9000), null); // two hours hidden
});

test("a line has gaps where nothing was measured", () => {
  const nowMs = 1_000_000;
  const points = [nowMs - WINDOW_MS, nowMs - 3000, nowMs - 2000, nowMs - 1000, nowMs].map((timeMs, i) => ({
    timeMs,
    value: i === 3 ? null : i,
  }));
  assert.equal(pathOf(points, nowMs, 4), "M0.0 90.0M297.0 67.5L298.0 45.0M300.0 0.0");
});

test("a scale ends at a round number", () => {
  assert.deepEqual([1, 1.2, 3, 7, 10, 11, 480].map(roundUp), [1, 2, 5, 10, 10, 20, 500]);
});
