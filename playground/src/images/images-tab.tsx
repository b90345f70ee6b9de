// Images: several at once, each with its previews, bar and cancel; a gallery that repeats a picture.
import { useState } from "preact/hooks";
import type { ImageModel } from "../api/types";
import { visible } from "../canvas/visible";
import { ModelChoice } from "../controls/choice";
import { Field } from "../controls/field";
import { Fold } from "../controls/fold";
import { fieldsOf, type Values } from "../controls/values";
import { useObserved } from "../observable";
import type { Asked } from "./drawing";
import { Gallery } from "./gallery";
import { Picture } from "./picture";
import { PromptForm, RepeatFile } from "./prompt-form";

const FIRST_PROMPT = "a red circle above a green square";

export function ImagesTab({ models }: { models: readonly ImageModel[] }) {
  const [gallery] = useState(() => new Gallery());
  const [model, setModel] = useState(models[0]);
  const [prompt, setPrompt] = useState(FIRST_PROMPT);
  const [values, setValues] = useState<Values>({});
  if (!model) return <p class="notice">No model that draws is served here.</p>;

  function take({ body, seed }: Asked) {
    setPrompt(String(body["prompt"] ?? body["class_labels"] ?? ""));
    setValues({ ...valuesOf(model!, body), seed });
  }

  return (
    <div class="bench">
      <aside class="panel" aria-label="Settings">
        <Fold title="Settings">
          <ModelChoice
            models={models}
            value={model.id}
            onValue={(id) => setModel(models.find((each) => each.id === id))}
          />
          {model.controls.map((control) => (
            <Field
              key={control.name}
              control={control}
              value={values[control.name] ?? ""}
              onValue={(value) => setValues({ ...values, [control.name]: value })}
            />
          ))}
        </Fold>
      </aside>
      <section class="work" aria-label="Pictures">
        <PromptForm
          model={model}
          prompt={prompt}
          onPrompt={setPrompt}
          onDraw={() => gallery.draw(asked(model, prompt, values))}
        />
        <Pictures gallery={gallery} onTake={take} />
      </section>
    </div>
  );
}

function asked(model: ImageModel, prompt: string, values: Values): Asked {
  const what = model.num_classes > 0 ? { class_labels: [Number(prompt) || 0] } : { prompt };
  const body = { model: model.id, ...what, ...fieldsOf(model.controls, values) };
  return { body, seed: values["seed"] ?? "" };
}

function Pictures({ gallery, onTake }: { gallery: Gallery; onTake: (asked: Asked) => void }) {
  const { drawings, problem } = useObserved(gallery);
  return (
    <>
      <RepeatFile onFile={(file) => void gallery.repeatFile(file)} />
      {problem !== null && <p class="failure">{visible(problem)}</p>}
      <ul class="gallery">
        {drawings.map((drawing) => (
          <Picture
            key={drawing.id}
            drawing={drawing}
            onRepeat={(recorded) => gallery.draw(recorded)}
            onTake={onTake}
            onRemove={() => gallery.remove(drawing)}
          />
        ))}
      </ul>
      {drawings.length === 0 && (
        <p class="hint">Press Draw more than once: the pictures are denoised together.</p>
      )}
    </>
  );
}

/** Return a request's fields as the form shows them; a scheduler is known by its name. */
function valuesOf(model: ImageModel, body: Record<string, unknown>): Values {
  const values: Record<string, string> = {};
  for (const { name } of model.controls) {
    const value = body[name];
    if (value === undefined || value === null) continue;
    const isNamed = typeof value === "object" && "name" in value;
    values[name] = String(isNamed ? value.name : value);
  }
  return values;
}
