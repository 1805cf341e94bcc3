// What went wrong, as a sentence for people. Knows the server's statuses and no page.

/** @import { Failure } from "../types.js" */

import { t } from "./i18n.js";

/**
 * Our sentence, and the server's own, which may say more ("" if there is none).
 * @param {Failure} failure
 * @returns {{ sentence: string, detail: string }}
 */
export function explain(failure) {
  if (failure.kind === "gone") return { sentence: t("failedGone"), detail: "" };
  if (failure.kind === "broken") return { sentence: t("failedBroken"), detail: "" };
  return { sentence: sentenceOf(failure), detail: failure.message };
}

/**
 * Whether the same question may get an answer when it is asked again: later, or with the key that the sentence wants.
 * What the server refused as wrong stays wrong until it is asked otherwise.
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
