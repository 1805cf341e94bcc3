// The settings of a job in the form with the examples: read for the server, and kept in the tab.

/** @import { JobSettings } from "../types.js" */

import { byId } from "./elements.js";
import { mark, readName, readNumber } from "./form-fields.js";
import { t } from "./i18n.js";
import { session } from "./storage.js";

const FIELDS = ["suffix", "held", "epochs", "publish-name", "publish-share"];

/** Fill the fields as they were left in this tab, and keep them when it leaves the page. */
export function keepSettings() {
  for (const id of FIELDS) {
    const kept = session.read(`tune-${id}`);
    if (kept !== "") byId(id, HTMLInputElement).value = kept;
  }
  const exact = byId("exact", HTMLInputElement);
  exact.checked ||= session.read("tune-exact") !== "";
  const isSet = exact.checked || byId("publish-name", HTMLInputElement).value !== "";
  if (isSet) byId("more", HTMLDetailsElement).open = true; // nothing acts unseen
  addEventListener("pagehide", () => {
    for (const id of FIELDS) session.write(`tune-${id}`, byId(id, HTMLInputElement).value);
    session.write("tune-exact", exact.checked ? "yes" : "");
  });
}

/**
 * The fields of a job other than its examples.
 * @returns {JobSettings | "wrong"} "wrong": the form says why
 */
export function readSettings() {
  const suffix = readName("suffix");
  const percent = readNumber("publish-share", { min: 1, max: 100 });
  const name = readName("publish-name", { required: percent !== null, rule: "adapterRule" });
  if (suffix === "wrong" || percent === "wrong" || name === "wrong") return "wrong";
  /** @type {JobSettings} */
  const settings = {};
  if (suffix !== "") settings.suffix = suffix;
  const isShared = percent !== null && percent < 100;
  if (name !== "") settings.publish = isShared ? { name, share: percent / 100 } : { name };
  if (byId("exact", HTMLInputElement).checked) settings.evaluate = ["exact_match"];
  return settings;
}

/**
 * Whether what is evaluated has examples held out for it; if not, the form says so.
 * @param {JobSettings} settings
 * @param {boolean} hasHeldOut
 */
export function canEvaluate({ evaluate }, hasHeldOut) {
  const canBe = evaluate === undefined || hasHeldOut;
  mark("exact", canBe ? "" : t("exactNeedsHeld"));
  return canBe;
}
