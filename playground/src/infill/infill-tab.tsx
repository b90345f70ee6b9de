// Infill: a text with gaps, which denoise in place while the rest stays as it is.
import { useState } from "preact/hooks";
import type { TextModel } from "../api/types";
import { usePace } from "../canvas/pace";
import { ModelChoice, PaceChoice } from "../controls/choice";
import { Fold } from "../controls/fold";
import { SettingsPanel } from "../controls/settings";
import { NO_SETTINGS, type Settings } from "../controls/values";
import { Editor } from "./editor";
import { FilledText } from "./filled-text";
import { Filling } from "./filling";
import type { Part } from "./gaps";

// The gaps say where a text ends.
const WITHOUT = ["max_tokens", "ignore_eos"];
const DEFAULT_PACE = 0;

/** Prefer a model that can fill gaps. */
function first(models: readonly TextModel[]): TextModel | undefined {
  return models.find((model) => model.infill.is_supported) ?? models[0];
}

export function InfillTab({ models }: { models: readonly TextModel[] }) {
  const [model, setModel] = useState(() => first(models));
  const [settings, setSettings] = useState<Settings>(NO_SETTINGS);
  const pace = usePace(DEFAULT_PACE);
  const [filling, setFilling] = useState<Filling | null>(null);
  if (!model) return <p class="notice">No model that writes text is served here.</p>;

  function choose(id: string) {
    filling?.stop();
    setFilling(null);
    setModel(models.find((each) => each.id === id));
    setSettings(NO_SETTINGS);
  }

  function fill(parts: Part[], question: string) {
    filling?.stop();
    const started = new Filling(model!, settings);
    setFilling(started);
    void started.run(parts, question);
  }

  return (
    <div class="bench">
      <aside class="panel" aria-label="Settings">
        <Fold title="Settings">
          <ModelChoice models={models} value={model.id} onValue={choose} />
          <PaceChoice pace={pace} />
          <fieldset>
            <legend>Decoding</legend>
            <SettingsPanel model={model} settings={settings} onSettings={setSettings} without={WITHOUT} />
          </fieldset>
        </Fold>
      </aside>
      <section class="work" aria-label="Text with gaps">
        {!model.infill.is_supported && (
          <p class="notice" role="note">
            {model.id} cannot fill gaps: {model.infill.reason}.
          </p>
        )}
        <Editor model={model} onFill={fill} />
        {filling && <FilledText filling={filling} rate={pace.rate} />}
      </section>
    </div>
  );
}
