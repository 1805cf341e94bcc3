// The states of jobs, and what a job is called.

/** @import { TuningJob } from "../types.js" */

export const STATUS_NAMES = /** @type {const} */ ({
  validating_files: "jobChecking",
  queued: "jobQueued",
  running: "jobRunning",
  paused: "jobPaused",
  succeeded: "jobSucceeded",
  failed: "stateFailed",
  cancelled: "jobCancelled",
});

/** @param {TuningJob} job */
export function isOver({ status }) {
  return status === "succeeded" || status === "failed" || status === "cancelled";
}

/** @param {TuningJob} job */
export function jobName(job) {
  return job.user_provided_suffix ?? job.id;
}
