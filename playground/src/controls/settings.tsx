// How a model decodes: its algorithm, that one's parameters, and the fields of every request.
import type { TextModel } from "../api/types";
import { Field } from "./field";
import { parametersOf, type Settings } from "./values";

interface Props {
  model: TextModel;
  settings: Settings;
  onSettings: (settings: Settings) => void;
  /** Names of fields that have no place here. */
  without?: readonly string[];
}

export function SettingsPanel({ model, settings, onSettings, without = [] }: Props) {
  const parameters = parametersOf(model, settings.algorithm);
  return (
    <div class="settings">
      <AlgorithmChoice model={model} settings={settings} onSettings={onSettings} />
      {parameters.map((control) => (
        <Field
          key={`${settings.algorithm}.${control.name}`}
          control={control}
          value={settings.parameters[control.name] ?? ""}
          onValue={(value) =>
            onSettings({ ...settings, parameters: { ...settings.parameters, [control.name]: value } })
          }
        />
      ))}
      <hr />
      {model.controls
        .filter((control) => !without.includes(control.name))
        .map((control) => (
          <Field
            key={control.name}
            control={control}
            value={settings.fields[control.name] ?? ""}
            onValue={(value) =>
              onSettings({ ...settings, fields: { ...settings.fields, [control.name]: value } })
            }
          />
        ))}
    </div>
  );
}

function AlgorithmChoice({ model, settings, onSettings }: Props) {
  return (
    <label class="field">
      <span>algorithm</span>
      <select
        name="algorithm"
        value={settings.algorithm}
        onChange={(event) =>
          // Another algorithm's parameters mean other things.
          onSettings({ ...settings, algorithm: event.currentTarget.value, parameters: {} })
        }
      >
        <option value="">default: {model.default_algorithm}</option>
        {model.algorithms.map((algorithm) => (
          <option key={algorithm.name} value={algorithm.name}>
            {algorithm.name}
          </option>
        ))}
      </select>
    </label>
  );
}
