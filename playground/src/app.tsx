// The page: its head, its four tabs, and what stands in for them while the server is not known yet.
import { useCallback, useEffect, useState } from "preact/hooks";
import { Announcements } from "./announce";
import { get, key, told } from "./api/client";
import type { ImageModel, Model, TextModel } from "./api/types";
import { EngineTab } from "./engine/engine-tab";
import { ImagesTab } from "./images/images-tab";
import { InfillTab } from "./infill/infill-tab";
import { KeyDialog } from "./key-dialog";
import { useObserved } from "./observable";
import { TextTab } from "./text/text-tab";
import { ThemeChoice } from "./theme";

const TABS = ["text", "infill", "images", "engine"] as const;
type Tab = (typeof TABS)[number];

function tabOf(hash: string): Tab {
  return TABS.find((tab) => `#${tab}` === hash) ?? "text";
}

function useTab(): Tab {
  const [tab, setTab] = useState(() => tabOf(location.hash));
  useEffect(() => {
    const follow = () => setTab(tabOf(location.hash));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return tab;
}

/** Return the served models, asked for with every key that is given, and what went wrong. */
function useModels(): { models: Model[] | null; problem: string | null; retry: () => void } {
  const [models, setModels] = useState<Model[] | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const retry = useCallback(() => {
    setProblem(null);
    get<{ data: Model[] }>("/v1/models").then(
      ({ data }) => setModels(data),
      (error: unknown) => setProblem(told(error)),
    );
  }, []);
  const { wanted, value } = useObserved(key);
  useEffect(() => {
    if (wanted === null) retry();
  }, [value, wanted, retry]);
  return { models, problem, retry };
}

export function App() {
  const tab = useTab();
  const { models, problem, retry } = useModels();
  return (
    <>
      <button type="button" class="skip" onClick={() => document.getElementById("main")?.focus()}>
        Skip to the content
      </button>
      <Head tab={tab} />
      <main id="main" tabIndex={-1}>
        {models !== null && <Tabs tab={tab} models={models} />}
        {models === null && problem === null && <p class="notice">Asking what is served…</p>}
        {models === null && problem !== null && (
          <p class="notice">
            {problem}{" "}
            <button type="button" onClick={retry}>
              Try again
            </button>
          </p>
        )}
      </main>
      <KeyDialog />
      <Announcements />
    </>
  );
}

function forgetKey(): void {
  key.give("");
  location.reload();
}

function Head({ tab }: { tab: Tab }) {
  return (
    <header class="head">
      <h1>
        <img src="/playground/icon.svg" alt="" width="28" height="28" />
        Sfumato
      </h1>
      <nav aria-label="Tabs">
        {TABS.map((name) => (
          <a key={name} href={`#${name}`} aria-current={name === tab ? "page" : undefined}>
            {name}
          </a>
        ))}
      </nav>
      <div class="head-end">
        {key.value && (
          <button type="button" onClick={forgetKey}>
            Forget key
          </button>
        )}
        <ThemeChoice />
      </div>
    </header>
  );
}

/** All tabs stay, so that what runs in one goes on while another is looked at. */
function Tabs({ tab, models }: { tab: Tab; models: readonly Model[] }) {
  const texts = models.filter((model): model is TextModel => model.makes === "text");
  const images = models.filter((model): model is ImageModel => model.makes === "image");
  return (
    <>
      <div hidden={tab !== "text"} data-tab="text">
        <TextTab models={texts} />
      </div>
      <div hidden={tab !== "infill"} data-tab="infill">
        <InfillTab models={texts} />
      </div>
      <div hidden={tab !== "images"} data-tab="images">
        <ImagesTab models={images} />
      </div>
      <div hidden={tab !== "engine"} data-tab="engine">
        <EngineTab models={models} isShown={tab === "engine"} />
      </div>
    </>
  );
}
