// Failures as sentences for the user.

/** @import { Failure } from "../types.js" */

import { t } from "./i18n.js";

/**
 * The page's sentence, and the server's, which may have more detail ("" if it sent none).
 * @param {Failure} failure
 * @returns {{ sentence: string, detail: string }}
 */
export function explain(failure) {
  if (failure.kind === "gone") return { sentence: t("failedGone"), detail: "" };
  if (failure.kind === "broken") return { sentence: t("failedBroken"), detail: "" };
  return { sentence: sentenceOf(failure), detail: failure.message };
}

/**
 * Whether a retry of the same question may succeed: later, or with the key that the sentence asks for. Invalid
 * requests stay invalid.
 * @param {Failure} failure
 */
export function canRetry({ status }) {
  return status === null || status === 401 || status === 429 || status >= 500;
}

/** @param {Failure} failure */
function sentenceOf({ status, retryAfterS }) {
  switch (status) {
    case 401:
      return t("failedKey");
    case 403:
      return t("failedForbidden");
    case 404:
      return t("failedModel");
    case 429:
      return retryAfterS === null ? t("failedBusy") : t("failedBusyIn", { seconds: retryAfterS });
    case 503:
      return t("failedUnavailable");
    default:
      return status !== null && status < 500 ? t("failedRequest") : t("failedServer");
  }
}
