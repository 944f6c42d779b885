/*
 * The command line: workloads separated by spaces or semicolons, each followed
 * by its parameters as key=value. A key=value before any workload belongs to
 * the loader or the firmware and is left alone.
 */
#include "probe.h"

bool same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static bool separator(char c) { return c == ' ' || c == ';' || c == ',' || c == '\n'; }

/* split cuts the next token off and returns it, its value cut off too. */
static char *split(char **rest, char **value)
{
	char *p = *rest;
	while (separator(*p))
		p++;
	if (!*p)
		return NULL;
	char *token = p;
	*value = NULL;
	for (; *p && !separator(*p); p++) {
		if (*p == '=' && !*value) {
			*p = 0;
			*value = p + 1;
		}
	}
	if (*p)
		*p++ = 0;
	*rest = p;
	return token;
}

int next_work(char **rest, struct work *w)
{
	char *token, *value;
	w->params = 0;
	do {
		token = split(rest, &value);
		if (!token)
			return 0;
	} while (value);
	w->name = token;
	for (;;) {
		char *before = *rest, *p = before;
		while (separator(*p))
			p++;
		while (*p && !separator(*p) && *p != '=')
			p++;
		if (*p != '=') /* the next workload, or the end */
			return 1;
		token = split(rest, &value);
		if (w->params < (int)(sizeof w->param / sizeof *w->param)) {
			w->param[w->params].key = token;
			w->param[w->params].value = value;
			w->params++;
		}
	}
}

const char *word(const struct work *w, const char *key, const char *otherwise)
{
	for (int i = 0; i < w->params; i++)
		if (same(w->param[i].key, key))
			return w->param[i].value;
	return otherwise;
}

u64 number(const struct work *w, const char *key, u64 otherwise)
{
	const char *s = word(w, key, NULL);
	if (!s)
		return otherwise;
	u64 n = 0;
	u64 base = 10;
	if (s[0] == '0' && s[1] == 'x') {
		base = 16;
		s += 2;
	}
	for (;; s++) {
		u64 digit = *s >= '0' && *s <= '9' ? (u64)(*s - '0')
			: base == 16 && (*s | 32) >= 'a' && (*s | 32) <= 'f' ? (u64)((*s | 32) - 'a' + 10) : 99;
		if (digit == 99)
			break;
		n = n * base + digit;
	}
	switch (*s) {
	case 'k': case 'K': return n << 10;
	case 'm': case 'M': return n << 20;
	case 'g': case 'G': return n << 30;
	}
	return n;
}
