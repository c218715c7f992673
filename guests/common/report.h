/* One-line messages to the host's log. Only facts about the model: never a user's text. */
#ifndef COMMON_REPORT_H
#define COMMON_REPORT_H

#include <stdint.h>

#include "glowplug.h"

typedef struct {
    char text[240]; /* longer messages are cut; names, which are shorter, end in a zero byte */
    uint32_t length;
} message;

/* Each appends and returns its message, so that calls nest. */
message *message_text(message *line, const char *text);
message *message_number(message *line, uint64_t number);

void message_log(const message *line, enum gp_log_level level);

/* `before`, the number and `after` as one error line. */
void report_error(const char *before, uint64_t number, const char *after);

#endif
