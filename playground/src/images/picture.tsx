// One picture of the gallery, while it is drawn and afterwards.
import { visible } from "../canvas/visible";
import { useObserved } from "../observable";
import type { Asked, Drawing } from "./drawing";

interface Props {
  drawing: Drawing;
  onRepeat: (recorded: Asked) => void;
  onTake: (recorded: Asked) => void;
  onRemove: () => void;
}

export function Picture({ drawing, onRepeat, onTake, onRemove }: Props) {
  useObserved(drawing);
  const { status, step, numSteps, url, failure } = drawing;
  return (
    <li class="picture" data-status={status} data-previews={drawing.numPreviews}>
      <div class="frame">
        {url !== null ? <img src={url} alt={visible(drawing.prompt)} /> : <span class="noise" />}
      </div>
      <p class="picture-prompt" dir="auto">
        {visible(drawing.prompt)}
      </p>
      {status === "drawing" ? (
        <>
          <progress max={numSteps || 1} value={step} aria-label={`Steps of ${drawing.prompt}`} />
          <p class="hint">
            step {step} / {numSteps || "…"}
          </p>
        </>
      ) : (
        <p class="hint">{status === "done" ? `seed ${drawing.seed}` : status}</p>
      )}
      {status === "failed" && failure !== null && <p class="failure">{visible(failure)}</p>}
      <Actions drawing={drawing} onRepeat={onRepeat} onTake={onTake} onRemove={onRemove} />
    </li>
  );
}

function Actions({ drawing, onRepeat, onTake, onRemove }: Props) {
  if (drawing.status === "drawing") {
    return (
      <div class="row">
        <button type="button" onClick={() => drawing.cancel()}>
          Cancel
        </button>
      </div>
    );
  }
  const { recorded, url } = drawing;
  return (
    <div class="row">
      {recorded !== null && (
        <>
          <button type="button" onClick={() => onRepeat(recorded)}>
            Repeat
          </button>
          <button type="button" onClick={() => onTake(recorded)}>
            Use settings
          </button>
        </>
      )}
      {drawing.status === "done" && url !== null && (
        <a class="button" href={url} download={`sfumato-${drawing.seed}.png`}>
          Save
        </a>
      )}
      <button type="button" aria-label={`Remove ${drawing.prompt}`} onClick={onRemove}>
        Remove
      </button>
    </div>
  );
}
