// Values as they are typed: an empty one is left out, and the server's default holds.
import type { Control, TextModel } from "../api/types";

export type Values = Readonly<Record<string, string>>;

/** Return what is typed as the JSON value that the control's type asks for. */
export function typed(control: Control, text: string): unknown {
  if (control.type.includes("bool") && (text === "true" || text === "false")) return text === "true";
  const isNumber = /int|float/.test(control.type);
  return isNumber && text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

/** Return the fields that are set, without the seed, whose digits are kept. */
export function fieldsOf(controls: readonly Control[], values: Values): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  for (const control of controls) {
    const text = values[control.name] ?? "";
    if (text !== "" && control.name !== "seed") fields[control.name] = typed(control, text);
  }
  return fields;
}

/** How a model is to decode; an empty algorithm is the server's choice. */
export interface Settings {
  algorithm: string;
  parameters: Values;
  fields: Values;
}

export const NO_SETTINGS: Settings = { algorithm: "", parameters: {}, fields: {} };

/** Return the controls of the chosen algorithm, with the defaults that hold for this model. */
export function parametersOf(model: TextModel, algorithm: string): Control[] {
  const name = algorithm || model.default_algorithm;
  const found = model.algorithms.find((each) => each.name === name)?.parameters ?? [];
  if (name !== model.default_algorithm) return found;
  const defaults = model.default_algorithm_parameters;
  return found.map((each) => (each.name in defaults ? { ...each, default: defaults[each.name]! } : each));
}

/** Return the settings as fields of a request's body. */
export function settingsBody(model: TextModel, settings: Settings): Record<string, unknown> {
  const body = fieldsOf(model.controls, settings.fields);
  const parameters = fieldsOf(parametersOf(model, settings.algorithm), settings.parameters);
  if (settings.algorithm) body["algorithm"] = settings.algorithm;
  if (Object.keys(parameters).length > 0) body["algorithm_parameters"] = parameters;
  return body;
}
