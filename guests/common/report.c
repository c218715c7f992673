#include "report.h"

message *message_text(message *line, const char *text) {
    while (*text && line->length < sizeof line->text)
        line->text[line->length++] = *text++;
    return line;
}

message *message_number(message *line, uint64_t number) {
    char digits[21] = {0};
    uint32_t first = sizeof digits - 1;
    do {
        digits[--first] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    return message_text(line, digits + first);
}

void message_log(const message *line, enum gp_log_level level) {
    gp_log(level, line->text, line->length);
}

void report_error(const char *before, uint64_t number, const char *after) {
    message line = {.length = 0};
    message_text(message_number(message_text(&line, before), number), after);
    message_log(&line, GP_LOG_ERROR);
}
