// Chat: streaming answers with their canvases, and the same question with two settings side by side.
import { useRef, useState } from "preact/hooks";
import type { TextModel } from "../api/types";
import { PACES } from "../canvas/player";
import { visible } from "../canvas/visible";
import { ModelChoice, PaceChoice } from "../controls/choice";
import { Fold } from "../controls/fold";
import { SettingsPanel } from "../controls/settings";
import { NO_SETTINGS, type Settings } from "../controls/values";
import { useObserved } from "../observable";
import { AnswerCard } from "./answer-card";
import { Composer } from "./composer";
import { Conversation, type Turn } from "./conversation";

const DEFAULT_PACE = 1;

/** Return why a model cannot chat here, or null. */
function whyNot(model: TextModel): string | null {
  return model.has_tokenizer ? null : "This model has no tokenizer: it is asked with token ids over the API.";
}

export function TextTab({ models }: { models: readonly TextModel[] }) {
  const [conversation] = useState(() => new Conversation());
  useObserved(conversation);
  const [modelId, setModelId] = useState(models[0]?.id ?? "");
  const [settings, setSettings] = useState<Settings[]>([NO_SETTINGS, NO_SETTINGS]);
  const [isComparing, setComparing] = useState(false);
  const [pace, setPace] = useState(DEFAULT_PACE);
  const rate = useRate(pace);
  const model = models.find((each) => each.id === modelId);
  if (!model) return <p class="notice">No model that writes text is served here.</p>;
  const used = isComparing ? settings : settings.slice(0, 1);
  const reason = whyNot(model);

  function choose(id: string) {
    conversation.clear();
    setModelId(id);
    setSettings([NO_SETTINGS, NO_SETTINGS]);
  }

  function change(index: number, next: Settings) {
    setSettings(settings.map((each, at) => (at === index ? next : each)));
  }

  return (
    <div class="bench">
      <aside class="panel" aria-label="Settings">
        <Fold title="Settings">
          <ModelChoice models={models} value={modelId} onValue={choose} />
          <PaceChoice value={pace} onValue={setPace} />
          <label class="check">
            <input
              type="checkbox"
              name="compare"
              checked={isComparing}
              onChange={(event) => setComparing(event.currentTarget.checked)}
            />
            compare two settings
          </label>
          <div class={isComparing ? "two-settings" : "one-setting"}>
            {used.map((each, index) => (
              <fieldset key={index} data-settings={index === 0 ? "A" : "B"}>
                <legend>{isComparing ? `Settings ${index === 0 ? "A" : "B"}` : "Decoding"}</legend>
                <SettingsPanel
                  model={model}
                  settings={each}
                  onSettings={(next) => change(index, next)}
                />
              </fieldset>
            ))}
          </div>
        </Fold>
      </aside>
      <section class="work" aria-label="Conversation">
        <Turns turns={conversation.turns} rate={rate} />
        {reason !== null ? (
          <p class="notice">{reason}</p>
        ) : (
          <Composer
            model={model}
            isRunning={conversation.isRunning}
            isEmpty={conversation.turns.length === 0}
            onAsk={(question) => void conversation.ask(model, question, used)}
            onStop={() => conversation.stop()}
            onClear={() => conversation.clear()}
          />
        )}
      </section>
    </div>
  );
}

/** Return a function that always reads the pace that is chosen now. */
export function useRate(pace: number): () => number {
  const chosen = useRef(pace);
  chosen.current = pace;
  const [rate] = useState(() => () => PACES[chosen.current]?.rate ?? Infinity);
  return rate;
}

function Turns({ turns, rate }: { turns: readonly Turn[]; rate: () => number }) {
  return (
    <div class="turns">
      {turns.map((turn, index) => (
        <div class="turn" key={index}>
          <p class="question" dir="auto">
            {visible(turn.question)}
          </p>
          <div class={turn.answers.length > 1 ? "answers compared" : "answers"}>
            {turn.answers.map((answer) => (
              <AnswerCard key={answer.name} answer={answer} rate={rate} />
            ))}
          </div>
        </div>
      ))}
    </div>
  );
}
