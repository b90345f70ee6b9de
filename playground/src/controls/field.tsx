// One control, drawn from what the server reports: its type, default, range and meaning.
import { useId } from "preact/hooks";
import type { Control } from "../api/types";

interface Props {
  control: Control;
  value: string;
  onValue: (value: string) => void;
}

function shown(value: Control["default"]): string {
  return value === null ? "" : String(value);
}

function range(control: Control): string {
  const { minimum, maximum } = control;
  if (minimum === undefined && maximum === undefined) return "";
  if (maximum === undefined) return `from ${minimum}`;
  // The ends of 64 bits say nothing to a reader.
  if (Math.abs(maximum) > Number.MAX_SAFE_INTEGER) return "";
  return minimum === undefined ? `to ${maximum}` : `${minimum} to ${maximum}`;
}

export function Field({ control, value, onValue }: Props) {
  const id = useId();
  const hint = [control.doc, range(control)].filter(Boolean).join("; ");
  return (
    <div class="field">
      <label for={id}>{control.name.replaceAll("_", " ")}</label>
      <Input id={id} control={control} value={value} onValue={onValue} />
      <small id={`${id}-hint`}>{hint}</small>
    </div>
  );
}

function Input({ id, control, value, onValue }: Props & { id: string }) {
  const about = { id, name: control.name, "aria-describedby": `${id}-hint` };
  const choices = control.type.includes("bool") ? ["true", "false"] : control.choices;
  if (choices) {
    return (
      <select {...about} value={value} onChange={(event) => onValue(event.currentTarget.value)}>
        <option value="">default{control.default === null ? "" : `: ${control.default}`}</option>
        {choices.map((choice) => (
          <option key={choice} value={choice}>
            {choice}
          </option>
        ))}
      </select>
    );
  }
  const shared = {
    ...about,
    value,
    autocomplete: "off",
    onInput: (event: { currentTarget: HTMLInputElement }) => onValue(event.currentTarget.value),
  };
  // Seeds have more digits than a number field keeps.
  if (control.name === "seed") return <input {...shared} type="text" inputMode="numeric" placeholder="drawn" />;
  if (!/int|float/.test(control.type)) {
    return <input {...shared} type="text" placeholder={shown(control.default)} />;
  }
  return (
    <input
      {...shared}
      type="number"
      step={control.type.includes("float") ? "any" : (control.unit ?? 1)}
      min={control.minimum}
      max={control.maximum}
      placeholder={shown(control.default)}
    />
  );
}
