// Chat: streaming answers with their canvases, and the same question with two settings side by side.
import { useState } from "preact/hooks";
import type { TextModel } from "../api/types";
import { usePace, type Pace } from "../canvas/pace";
import { visible } from "../canvas/visible";
import { ModelChoice, PaceChoice } from "../controls/choice";
import { Fold } from "../controls/fold";
import { SettingsPanel } from "../controls/settings";
import { NO_SETTINGS, type Settings } from "../controls/values";
import { useObserved } from "../observable";
import { AnswerCard } from "./answer-card";
import { Composer } from "./composer";
import { Conversation, type Turn } from "./conversation";
import { Welcome } from "./welcome";

const DEFAULT_PACE = 1;
const NO_TOKENIZER = "This model has no tokenizer: it is asked with token ids over the API.";

export function TextTab({ models }: { models: readonly TextModel[] }) {
  const [conversation] = useState(() => new Conversation());
  useObserved(conversation);
  const [model, setModel] = useState(models[0]);
  const [settings, setSettings] = useState<readonly Settings[]>([NO_SETTINGS]);
  const pace = usePace(DEFAULT_PACE);
  if (!model) return <p class="notice">No model that writes text is served here.</p>;

  function choose(id: string) {
    conversation.clear();
    setModel(models.find((each) => each.id === id));
    setSettings(settings.map(() => NO_SETTINGS));
  }

  const ask = (question: string) => void conversation.ask(model, question, settings);
  return (
    <div class="bench">
      <aside class="panel" aria-label="Settings">
        <Fold title="Settings">
          <ModelChoice models={models} value={model.id} onValue={choose} />
          <PaceChoice pace={pace} />
          <AllSettings model={model} settings={settings} onSettings={setSettings} />
        </Fold>
      </aside>
      <section class="work" aria-label="Conversation">
        {conversation.isEmpty && <Welcome model={model} onAsk={ask} />}
        <Turns turns={conversation.turns} pace={pace} />
        {model.has_tokenizer ? (
          <Composer model={model} conversation={conversation} onAsk={ask} />
        ) : (
          <p class="notice">{NO_TOKENIZER}</p>
        )}
      </section>
    </div>
  );
}

interface AllSettingsProps {
  model: TextModel;
  settings: readonly Settings[];
  onSettings: (settings: readonly Settings[]) => void;
}

/** One panel of settings, or two that are compared. */
function AllSettings({ model, settings, onSettings }: AllSettingsProps) {
  const isComparing = settings.length > 1;
  // The second begins as a copy of the first, so that one change is what is compared.
  const compare = (isWanted: boolean) =>
    onSettings(isWanted ? [settings[0]!, settings[0]!] : settings.slice(0, 1));
  return (
    <>
      <label class="check">
        <input
          type="checkbox"
          name="compare"
          checked={isComparing}
          onChange={(event) => compare(event.currentTarget.checked)}
        />
        compare two settings
      </label>
      {settings.map((each, index) => (
        <fieldset key={index} data-settings={"AB"[index]}>
          <legend>{isComparing ? `Settings ${"AB"[index]}` : "Decoding"}</legend>
          <SettingsPanel
            model={model}
            settings={each}
            onSettings={(next) => onSettings(settings.map((old, at) => (at === index ? next : old)))}
          />
        </fieldset>
      ))}
    </>
  );
}

function Turns({ turns, pace }: { turns: readonly Turn[]; pace: Pace }) {
  return (
    <div class="turns">
      {turns.map((turn, index) => (
        <div class="turn" key={index}>
          <p class="question" dir="auto">
            {visible(turn.question)}
          </p>
          <div class={turn.answers.length > 1 ? "answers compared" : "answers"}>
            {turn.answers.map((answer) => (
              <AnswerCard key={answer.name} answer={answer} rate={pace.rate} />
            ))}
          </div>
        </div>
      ))}
    </div>
  );
}
