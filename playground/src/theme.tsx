// Light or dark: as the system says, until somebody chooses here.
import { useLayoutEffect, useState } from "preact/hooks";

const NAME = "sfumato-theme";
const THEMES = ["system", "light", "dark"] as const;
type Theme = (typeof THEMES)[number];

const SHAPES: Record<Theme, string> = {
  system: "M8 2a6 6 0 0 1 0 12z",
  light: "",
  dark: "M8 2a6 6 0 0 1 0 12 6 6 0 0 1 0-12z",
};

function stored(): Theme {
  const found = localStorage.getItem(NAME);
  return THEMES.find((theme) => theme === found) ?? "system";
}

export function ThemeChoice() {
  const [theme, setTheme] = useState(stored);
  useLayoutEffect(() => {
    if (theme === "system") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
    localStorage.setItem(NAME, theme);
  }, [theme]);
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]!;
  return (
    <button
      type="button"
      class="icon-button"
      aria-label={`Theme: ${theme}; change to ${next}`}
      title={`Theme: ${theme}`}
      data-choice={theme}
      onClick={() => setTheme(next)}
    >
      <svg viewBox="0 0 16 16" aria-hidden="true">
        <circle cx="8" cy="8" r="6" class="ring" />
        <path d={SHAPES[theme]} />
      </svg>
    </button>
  );
}
