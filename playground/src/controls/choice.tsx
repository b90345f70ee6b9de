// Small choices that several tabs have: the model, and how fast a canvas is shown.
import { CellLegend } from "../canvas/cells";
import { PACES, type Pace } from "../canvas/pace";

interface ModelChoiceProps {
  models: readonly { id: string }[];
  value: string;
  onValue: (id: string) => void;
}

export function ModelChoice({ models, value, onValue }: ModelChoiceProps) {
  return (
    <label class="field">
      <span>model</span>
      <select name="model" value={value} onChange={(event) => onValue(event.currentTarget.value)}>
        {models.map((model) => (
          <option key={model.id} value={model.id}>
            {model.id}
          </option>
        ))}
      </select>
    </label>
  );
}

export function PaceChoice({ pace: { index, choose } }: { pace: Pace }) {
  return (
    <>
      <label class="field">
        <span>show the canvas at</span>
        <select name="pace" value={index} onChange={(event) => choose(Number(event.currentTarget.value))}>
          {PACES.map(({ name }, at) => (
            <option key={name} value={at}>
              {name}
            </option>
          ))}
        </select>
        <small>small models take milliseconds; the answer itself comes at full speed</small>
      </label>
      <CellLegend />
    </>
  );
}
